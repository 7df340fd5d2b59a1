//! The smallest HTTP client that can ask an agent how it is.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::netns::Netns;

/// GET from inside a namespace: (status, body).
pub fn get(netns: &Netns, address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = netns.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let body =
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunk(body) } else { body.into() };
    status.map(|status| (status, body)).ok_or_else(|| io::Error::other(format!("no HTTP answer: {answer:?}")))
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let Some((chunk, next)) = rest.split_at_checked(size).filter(|_| size > 0) else { break };
        whole.push_str(chunk);
        body = next.trim_start_matches("\r\n");
    }
    whole
}

/// The sum of a Prometheus metric over the series that have all of `labels`.
pub fn metric(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let of_name = text.lines().filter_map(|line| line.strip_prefix(name));
    let series = of_name.filter(|rest| rest.starts_with('{') || rest.starts_with(' '));
    let wanted = series.filter(|rest| labels.iter().all(|(key, value)| rest.contains(&format!("{key}=\"{value}\""))));
    wanted.filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_the_series_that_have_the_labels() {
        let text = "# HELP a_total x\na_total{r=\"s\",q=\"1\"} 2\na_total{r=\"s\",q=\"2\"} 3\na_total{r=\"d\"} 7\na_total_b 9\n";
        assert!((metric(text, "a_total", &[("r", "s")]) - 5.0).abs() < 1e-9);
        assert!((metric(text, "a_total", &[]) - 12.0).abs() < 1e-9);
    }

    #[test]
    fn joins_chunks() {
        assert_eq!(unchunk("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), "abcde");
    }
}
