//! What the load generators print, as numbers. Pure.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::plan::Figure;

/// The figures of one load.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    pub figures: Vec<(Figure, f64)>,
    /// How much was done: requests, connections, or gigabytes. CPU is counted per 100 000 of the former, per one of the latter.
    pub amount: f64,
}

/// For wrk: its `done` hook prints one line of JSON.
pub const WRK_SCRIPT: &str = r#"done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"us":%d,"p50":%d,"p99":%d,"failed":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

fn json_line(text: &str) -> Result<Value> {
    let line = text.lines().rev().find(|line| line.starts_with('{')).context("it printed no result")?;
    serde_json::from_str(line).context("its result is cut off")
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value.pointer(key).and_then(Value::as_f64).with_context(|| format!("its result has no {key}"))
}

/// A load that failed in part measured something else: more than one request in a thousand is no result.
fn tolerate(failed: f64, done: f64) -> Result<()> {
    if done < 1.0 {
        bail!("nothing came back");
    }
    if failed > done / 1000.0 {
        bail!("{failed} of {done} failed");
    }
    Ok(())
}

pub fn wrk(text: &str) -> Result<Measured> {
    let json = json_line(text)?;
    let requests = number(&json, "/requests")?;
    tolerate(number(&json, "/failed")?, requests)?;
    let figures = vec![
        (Figure::PerSecond, requests / (number(&json, "/us")? / 1e6)),
        (Figure::P50, number(&json, "/p50")?),
        (Figure::P99, number(&json, "/p99")?),
    ];
    Ok(Measured { figures, amount: requests })
}

pub fn rate(text: &str) -> Result<Measured> {
    let json = json_line(text)?;
    let done = number(&json, "/done")?;
    tolerate(number(&json, "/failed")?, done)?;
    let figures = vec![
        (Figure::PerSecond, number(&json, "/per_second")?),
        (Figure::P50, number(&json, "/p50")?),
        (Figure::P99, number(&json, "/p99")?),
        (Figure::P999, number(&json, "/p999")?),
    ];
    Ok(Measured { figures, amount: done })
}

pub fn iperf(text: &str) -> Result<Measured> {
    let start = text.find('{').context("iperf3 printed no JSON")?;
    let json: Value = serde_json::from_str(&text[start..]).context("iperf3's JSON is cut off")?;
    if let Some(error) = json.get("error").and_then(Value::as_str) {
        bail!("iperf3: {error}");
    }
    let bytes = number(&json, "/end/sum_received/bytes")?;
    tolerate(0.0, bytes)?;
    let figures = vec![(Figure::Gbit, number(&json, "/end/sum_received/bits_per_second")? / 1e9)];
    Ok(Measured { figures, amount: bytes / 1e9 })
}

pub fn ab(text: &str) -> Result<Measured> {
    let field = |name: &str| {
        let line =
            text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("ab says no {name:?}"))?;
        let first = line.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
        first.with_context(|| format!("ab's {name:?} is no number"))
    };
    let done = field("Complete requests:")?;
    let others = text.lines().find_map(|line| line.strip_prefix("Non-2xx responses:")).is_some();
    if others {
        bail!("some answers of the server were not 200");
    }
    tolerate(field("Failed requests:")?, done)?;
    let milliseconds = |percent: &str| {
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix(percent));
        line.and_then(|rest| rest.trim().parse::<f64>().ok()).with_context(|| format!("ab says no {percent}"))
    };
    let figures = vec![
        (Figure::PerSecond, field("Requests per second:")?),
        (Figure::P50, milliseconds("50%")? * 1000.0),
        (Figure::P99, milliseconds("99%")? * 1000.0),
    ];
    Ok(Measured { figures, amount: done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_wrk() {
        let text = "Running 1s test\n  3 requests in 1s\n\n{\"requests\":4000,\"us\":2000000,\"p50\":84,\"p99\":1500,\"failed\":4}\n";
        let got = wrk(text).unwrap();
        assert_eq!(got.figures, [(Figure::PerSecond, 2000.0), (Figure::P50, 84.0), (Figure::P99, 1500.0)]);
        assert!((got.amount - 4000.0).abs() < 1e-9);
    }

    #[test]
    fn a_load_that_failed_is_no_result() {
        let failed = wrk("{\"requests\":4000,\"us\":2000000,\"p50\":84,\"p99\":1500,\"failed\":5}").unwrap_err();
        assert_eq!(failed.to_string(), "5 of 4000 failed");
        let nothing = wrk("{\"requests\":0,\"us\":2000000,\"p50\":0,\"p99\":0,\"failed\":0}").unwrap_err();
        assert_eq!(nothing.to_string(), "nothing came back");
        assert!(wrk("unable to connect").is_err());
    }

    #[test]
    fn reads_iperf() {
        let text = "noise\n{\"end\":{\"sum_received\":{\"bytes\":5000000000,\"bits_per_second\":8e9}}}";
        let got = iperf(text).unwrap();
        assert_eq!((got.figures, got.amount), (vec![(Figure::Gbit, 8.0)], 5.0));
        let refused = iperf("{\"start\":{},\"end\":{},\"error\":\"unable to connect to server\"}").unwrap_err();
        assert_eq!(refused.to_string(), "iperf3: unable to connect to server");
    }

    const AB: &str = "Complete requests:      5000\nFailed requests:        0\nRequests per second:    790.40 [#/sec] (mean)\n\
                      Percentage of the requests served within a certain time (ms)\n  50%     18\n  99%     41\n 100%     60\n";

    #[test]
    fn reads_ab() {
        let got = ab(AB).unwrap();
        assert_eq!(got.figures, [(Figure::PerSecond, 790.4), (Figure::P50, 18000.0), (Figure::P99, 41000.0)]);
        assert!(ab(&AB.replace("Failed requests:        0", "Failed requests:        9")).is_err());
        assert!(ab(&format!("{AB}Non-2xx responses: 1\n")).is_err());
        assert!(ab("apr_socket_recv: Connection reset by peer (104)\n").is_err());
    }

    #[test]
    fn reads_the_generator_of_constant_rate() {
        let text = "{\"done\":1000,\"failed\":0,\"per_second\":500.0,\"p50\":80.5,\"p99\":200.0,\"p999\":900.0}";
        assert_eq!(rate(text).unwrap().figures.len(), 4);
    }
}
