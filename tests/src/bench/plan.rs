//! What is measured: the modes side by side, the rows of load, the figures of a row.

use clap::ValueEnum;

/// What carries the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum Mode {
    #[value(name = "none", help = "no mesh")]
    NoMesh,
    #[value(name = "envoy-c1", help = "an Envoy beside each pod, one worker thread")]
    EnvoyC1,
    #[value(name = "envoy-c2", help = "an Envoy beside each pod, two worker threads, which is Istio's default")]
    EnvoyC2,
    #[value(name = "ours", help = "Nodemesh, an agent on each of two nodes")]
    Ours,
}

impl Mode {
    pub fn title(self) -> &'static str {
        match self {
            Mode::NoMesh => "no mesh",
            Mode::EnvoyC1 => "Envoy c1",
            Mode::EnvoyC2 => "Envoy c2",
            Mode::Ours => "Nodemesh",
        }
    }

    pub fn is_envoy(self) -> bool {
        matches!(self, Mode::EnvoyC1 | Mode::EnvoyC2)
    }
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum Row {
    #[value(help = "wrk, 1 connection")]
    Http1,
    #[value(help = "wrk, 16 connections")]
    Http16,
    #[value(help = "wrk, 64 connections")]
    Http64,
    #[value(help = "requests at a fixed rate, open loop")]
    Rate,
    #[value(help = "iperf3, 1 stream")]
    Bulk1,
    #[value(help = "iperf3, 4 streams")]
    Bulk4,
    #[value(help = "ab, 16 at a time, a connection for each request")]
    Connect,
}

impl Row {
    /// A load that leaves the processors idle between requests measures how fast an idle one wakes up: it runs beside a
    /// spinner of the lowest priority, alike for all modes. Not the fixed rate, whose tail is what is asked for: a spinner
    /// takes turns of a millisecond for all its low priority, and was seen to raise the p99 of no mesh five times. For the
    /// same reason no p99 of one connection is reported.
    pub fn leaves_idle(self) -> bool {
        matches!(self, Row::Http1)
    }
}

/// A figure of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Figure {
    /// Requests or connections per second.
    PerSecond,
    Gbit,
    /// Latencies in microseconds.
    P50,
    P99,
    P999,
    /// Seconds of processor, of every kind and on the whole machine, without neighbours and without what an idle machine
    /// takes: per 100 000 requests or connections, or per gigabyte.
    Cpu,
    /// Of that, by process: the load generator, the server, the proxies.
    CpuClient,
    CpuServer,
    CpuProxyUser,
    CpuProxySystem,
    /// Of that, outside of every process or in its name: softirq and irq as the kernel counts them by tick.
    CpuSoftirq,
    /// Share of the machine that processes not of this run took meanwhile.
    Neighbours,
    /// Resident memory of all proxies after the load, in MiB.
    Rss,
}

impl Figure {
    pub fn id(self) -> &'static str {
        match self {
            Figure::PerSecond => "per_second",
            Figure::Gbit => "gbit_per_second",
            Figure::P50 => "p50_us",
            Figure::P99 => "p99_us",
            Figure::P999 => "p999_us",
            Figure::Cpu => "cpu",
            Figure::CpuClient => "cpu_client",
            Figure::CpuServer => "cpu_server",
            Figure::CpuProxyUser => "cpu_proxy_user",
            Figure::CpuProxySystem => "cpu_proxy_system",
            Figure::CpuSoftirq => "cpu_softirq",
            Figure::Neighbours => "neighbours_share",
            Figure::Rss => "proxies_rss_mib",
        }
    }

    pub fn higher_is_better(self) -> bool {
        matches!(self, Figure::PerSecond | Figure::Gbit)
    }
}

/// A line of the report.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    pub label: &'static str,
    pub row: Row,
    pub figure: Figure,
}

const fn line(label: &'static str, row: Row, figure: Figure) -> Line {
    Line { label, row, figure }
}

/// The lines of the report, in their order.
pub const LINES: [Line; 29] = [
    line("requests/s, 1 conn", Row::Http1, Figure::PerSecond),
    line("  p50 us", Row::Http1, Figure::P50),
    line("requests/s, 16 conn", Row::Http16, Figure::PerSecond),
    line("  p50 us", Row::Http16, Figure::P50),
    line("  p99 us", Row::Http16, Figure::P99),
    line("requests/s, 64 conn", Row::Http64, Figure::PerSecond),
    line("  p50 us", Row::Http64, Figure::P50),
    line("  p99 us", Row::Http64, Figure::P99),
    line("fixed rate: per s", Row::Rate, Figure::PerSecond),
    line("  p50 us", Row::Rate, Figure::P50),
    line("  p99 us", Row::Rate, Figure::P99),
    line("  p99.9 us", Row::Rate, Figure::P999),
    line("Gbit/s, 1 stream", Row::Bulk1, Figure::Gbit),
    line("Gbit/s, 4 streams", Row::Bulk4, Figure::Gbit),
    line("new connections/s", Row::Connect, Figure::PerSecond),
    line("  p99 us", Row::Connect, Figure::P99),
    line("CPU-s/100k req, 16", Row::Http16, Figure::Cpu),
    line("  wrk", Row::Http16, Figure::CpuClient),
    line("  nginx", Row::Http16, Figure::CpuServer),
    line("  proxies, user", Row::Http16, Figure::CpuProxyUser),
    line("  proxies, system", Row::Http16, Figure::CpuProxySystem),
    line("  softirq (by tick)", Row::Http16, Figure::CpuSoftirq),
    line("CPU-s/100k req, 64", Row::Http64, Figure::Cpu),
    line("CPU-s/100k req, rate", Row::Rate, Figure::Cpu),
    line("CPU-s/100k conn", Row::Connect, Figure::Cpu),
    line("  proxies, user", Row::Connect, Figure::CpuProxyUser),
    line("  proxies, system", Row::Connect, Figure::CpuProxySystem),
    line("CPU-s/GB, 1 stream", Row::Bulk1, Figure::Cpu),
    line("CPU-s/GB, 4 streams", Row::Bulk4, Figure::Cpu),
];

/// As the command line spells it.
pub fn name<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
