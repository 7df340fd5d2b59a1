//! Metric families made by hand, for collectors that read their values at scrape time.

use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};

/// Name and help.
pub(super) type About = (&'static str, &'static str);
pub(super) type Labels<'a> = Vec<(&'a str, &'a str)>;

pub(super) fn gauges<'a>((name, help): About, samples: impl IntoIterator<Item = (Labels<'a>, f64)>) -> MetricFamily {
    let metrics = samples.into_iter().map(|(labels, value)| {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        let mut metric = Metric::from_label(pairs(&labels));
        metric.set_gauge(gauge);
        metric
    });
    family(name, help, MetricType::GAUGE, metrics.collect())
}

pub(super) fn counters<'a>(about: About, samples: impl IntoIterator<Item = (Labels<'a>, u64)>) -> MetricFamily {
    counters_f64(about, samples.into_iter().map(|(labels, value)| (labels, value as f64)))
}

pub(super) fn counters_f64<'a>(
    (name, help): About,
    samples: impl IntoIterator<Item = (Labels<'a>, f64)>,
) -> MetricFamily {
    let metrics = samples.into_iter().map(|(labels, value)| {
        let mut counter = Counter::default();
        counter.set_value(value);
        let mut metric = Metric::from_label(pairs(&labels));
        metric.set_counter(counter);
        metric
    });
    family(name, help, MetricType::COUNTER, metrics.collect())
}

/// What a histogram has counted: by upper bound, all that is no more than it.
pub(super) struct Distribution {
    pub buckets: Vec<(f64, u64)>,
    pub count: u64,
    pub sum: f64,
}

pub(super) fn histograms<'a>(
    (name, help): About,
    samples: impl IntoIterator<Item = (Labels<'a>, Distribution)>,
) -> MetricFamily {
    let metrics = samples.into_iter().map(|(labels, Distribution { buckets, count, sum })| {
        let bucket = |(bound, count): (f64, u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.into_iter().map(bucket).collect());
        histogram.set_sample_count(count);
        histogram.set_sample_sum(sum);
        let mut metric = Metric::from_label(pairs(&labels));
        metric.set_histogram(histogram);
        metric
    });
    family(name, help, MetricType::HISTOGRAM, metrics.collect())
}

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn pairs(labels: &Labels<'_>) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    labels.iter().map(pair).collect()
}
