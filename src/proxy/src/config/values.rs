//! From TOML values to settings. Each says what was expected when it is something else.

use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::ListenAddress;

type Parsed<T> = Result<T, String>;

pub(super) fn boolean(value: &DeValue<'_>) -> Parsed<bool> {
    value
        .as_bool()
        .ok_or_else(|| unexpected("true or false", value))
}

pub(super) fn text(value: &DeValue<'_>) -> Parsed<String> {
    match value.as_str() {
        Some("") => Err("must not be empty".to_owned()),
        Some(text) => Ok(text.to_owned()),
        None => Err(unexpected("a string", value)),
    }
}

pub(super) fn path(value: &DeValue<'_>) -> Parsed<PathBuf> {
    text(value).map(PathBuf::from)
}

/// An integer from `min` to `max`.
pub(super) fn integer(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<u64> {
    move |value| {
        let expected = || unexpected(&format!("an integer from {min} to {max}"), value);
        let number = as_integer(value).ok_or_else(expected)?;
        let number = u64::try_from(number).ok();
        number
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(expected)
    }
}

pub(super) fn small(min: u32, max: u32) -> impl Fn(&DeValue<'_>) -> Parsed<u32> {
    let integer = integer(min.into(), max.into());
    move |value| integer(value).map(|n| u32::try_from(n).unwrap_or(max))
}

pub(super) fn port(min: u16) -> impl Fn(&DeValue<'_>) -> Parsed<u16> {
    let integer = integer(min.into(), u16::MAX.into());
    move |value| integer(value).map(|n| u16::try_from(n).unwrap_or(u16::MAX))
}

pub(super) fn count(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<usize> {
    let integer = integer(min, max);
    move |value| integer(value).and_then(|n| usize::try_from(n).map_err(|e| e.to_string()))
}

/// A whole number of seconds.
pub(super) fn seconds(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<Duration> {
    let integer = integer(min, max);
    move |value| integer(value).map(Duration::from_secs)
}

/// A whole number of milliseconds.
pub(super) fn millis(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<Duration> {
    let integer = integer(min, max);
    move |value| integer(value).map(Duration::from_millis)
}

/// `"500ms"`, `"2s"`, `"1min"`, `"1h"`, or a number of seconds; more than nothing, at most a day.
pub(super) fn duration(value: &DeValue<'_>) -> Parsed<Duration> {
    let expected = || unexpected("a duration such as \"500ms\" or \"2s\", up to a day", value);
    let millis = match value.as_str() {
        None => as_integer(value).and_then(|n| u64::try_from(n).ok()?.checked_mul(1000)),
        Some(text) => {
            let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
            let unit = match text[digits.len()..].trim() {
                "ms" => Some(1),
                "s" => Some(1000),
                "min" | "m" => Some(60_000),
                "h" => Some(3_600_000),
                _ => None,
            };
            let number = digits.parse::<u64>().ok();
            unit.zip(number).and_then(|(unit, n)| n.checked_mul(unit))
        }
    };
    millis
        .filter(|ms| (1..=86_400_000).contains(ms))
        .map(Duration::from_millis)
        .ok_or_else(expected)
}

/// A number of bytes, or `"16MiB"`, `"16MB"` (the same: 1024 based, as in PostgreSQL).
pub(super) fn bytes(min: u64, max: u64) -> impl Fn(&DeValue<'_>) -> Parsed<usize> {
    move |value| {
        let what = format!("a number of bytes from {min} to {max}, or a size such as \"16MiB\"");
        let expected = || unexpected(&what, value);
        let number = match value.as_str() {
            None => as_integer(value).and_then(|n| u64::try_from(n).ok()),
            Some(text) => {
                let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
                let shift = match text[digits.len()..].trim() {
                    "B" => Some(0),
                    "kB" | "KB" | "KiB" => Some(10),
                    "MB" | "MiB" => Some(20),
                    "GB" | "GiB" => Some(30),
                    _ => None,
                };
                let number = digits.parse::<u64>().ok();
                shift
                    .zip(number)
                    .and_then(|(shift, n)| n.checked_mul(1 << shift))
            }
        };
        let number = number.filter(|n| (min..=max).contains(n));
        number
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(expected)
    }
}

/// One of a few words.
pub(super) fn choice<T: Copy>(
    choices: &'static [(&'static str, T)],
) -> impl Fn(&DeValue<'_>) -> Parsed<T> {
    move |value| {
        let found = choices
            .iter()
            .find(|(name, _)| value.as_str() == Some(name));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<String> = choices.iter().map(|(n, _)| format!("\"{n}\"")).collect();
            unexpected(&names.join(" or "), value)
        })
    }
}

/// `host:port`, `[::1]:port`, `*:port`, `:port`.
pub(super) fn address(value: &DeValue<'_>) -> Parsed<ListenAddress> {
    let expected = || unexpected("an address such as \"127.0.0.1:6432\" or \"*:6432\"", value);
    let text = value.as_str().ok_or_else(expected)?;
    let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match bracketed {
        Some(inner) => inner,
        None if host.contains(':') => return Err(expected()),
        None if host.is_empty() => "*",
        None => host,
    };
    Ok(ListenAddress {
        host: host.to_owned(),
        port: port.parse().map_err(|_| expected())?,
    })
}

fn as_integer(value: &DeValue<'_>) -> Option<i64> {
    let integer = value.as_integer()?;
    i64::from_str_radix(&integer.as_str().replace('_', ""), integer.radix()).ok()
}

fn unexpected(expected: &str, value: &DeValue<'_>) -> String {
    let got = match value {
        DeValue::String(text) => format!("\"{text}\""),
        DeValue::Integer(number) => number.as_str().to_owned(),
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(value) => value.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    };
    format!("expected {expected}, got {got}")
}
