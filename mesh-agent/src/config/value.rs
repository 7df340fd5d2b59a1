//! Text -> value, for the kinds of values that settings have. Errors are the end of a sentence that begins with the
//! setting's name.

use std::net::SocketAddr;
use std::time::Duration;

/// Reads `90s`, `5m`, `24h`, `7d`, or several in a row: `1h30m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is no time; write a number with a unit, such as 90s, 5m or 24h");
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let unit_end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit_ms: u64 = match &rest[..unit_end] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        let ms = number.checked_mul(unit_ms).ok_or_else(bad)?;
        total = total.checked_add(Duration::from_millis(ms)).ok_or_else(bad)?;
        rest = &rest[unit_end..];
    }
    Ok(total)
}

/// As `duration`, writes it: `1h30m`.
pub fn written_duration(time: Duration) -> String {
    let mut ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if ms / size > 0 {
            text += &format!("{}{unit}", ms / size);
            ms %= size;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

pub(super) fn duration_between(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let time = duration(text)?;
    if time < min || time > max {
        let (min, max) = (written_duration(min), written_duration(max));
        return Err(format!("{text} is out of range; write {min} to {max}"));
    }
    Ok(time)
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is no address; write ip:port, such as 0.0.0.0:15020 or [::]:15020"))
}

/// `host:port`, where host is a name or an address; IPv6 in brackets.
pub(super) fn host_port(text: &str) -> Result<String, String> {
    let bad = || format!("`{text}` is no host:port; write for example controller.mesh:15012 or [fd00::1]:15012");
    if let Ok(address) = text.parse::<SocketAddr>() {
        return if address.port() == 0 { Err(bad()) } else { Ok(text.to_owned()) };
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let port: u16 = port.parse().map_err(|_| bad())?;
    if port == 0 || !is_dns_name(host) {
        return Err(bad());
    }
    Ok(text.to_owned())
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

pub(super) fn number(text: &str, min: u32, max: u32) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("`{text}` is no number from {min} to {max}")),
    }
}

/// A DNS name in lower case, as Kubernetes wants it for nodes and domains.
pub fn dns_name(text: &str) -> Result<String, String> {
    if is_dns_name(text) && !text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is no name; use lower-case letters, digits, `-` and `.`, beginning and ending with the former"
    ))
}

/// A name of one label, as Kubernetes wants it for namespaces.
pub(super) fn label(text: &str) -> Result<String, String> {
    if text.len() <= 63 && !text.contains('.') && dns_name(text).is_ok() {
        return Ok(text.to_owned());
    }
    Err(format!("`{text}` is no namespace; use up to 63 lower-case letters, digits and `-`"))
}

fn is_dns_name(text: &str) -> bool {
    let good_label = |label: &str| {
        let bytes = label.as_bytes();
        matches!(bytes, [first, .., last] if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric())
            || matches!(bytes, [only] if only.is_ascii_alphanumeric())
    };
    text.len() <= 253
        && text
            .split('.')
            .all(|l| l.len() <= 63 && good_label(l) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
}
