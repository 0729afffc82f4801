//! What a client asks for: `godwit://HOST[:PORT]?mode=auto&…`.
//!
//! containerd lets a migration request through in one place only, the `image_path` of its `CheckpointOptions`,
//! so the request is a URI. A key or value that is not known is refused by name: a typing mistake must never
//! become a default.

use std::fmt;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The port an agent listens on unless told another.
pub const DEFAULT_PORT: u16 = 7450;

/// The scheme of a migration request.
pub const SCHEME: &str = "godwit://";

/// When a page travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Pre-copy while it converges; then whatever the limits allow.
    Auto,
    /// All pages travel while the container is frozen.
    Native,
    /// Pages travel while it runs, in rounds; what was written last travels while it is frozen.
    Precopy,
    /// All pages travel after it runs on the target, those it misses first.
    Postcopy,
    /// Rounds while it runs, and what was written last after it runs on the target.
    Hybrid,
}

impl Mode {
    /// Every mode, in the order `--help` shows them.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Native, Self::Precopy, Self::Postcopy, Self::Hybrid];

    /// Returns the name used in requests and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
        }
    }

    /// Tells whether pages travel in rounds while the container runs.
    #[must_use]
    pub const fn has_rounds(self) -> bool {
        matches!(self, Self::Auto | Self::Precopy | Self::Hybrid)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = RequestError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| RequestError::UnknownMode { mode: name.to_owned() })
    }
}

/// Where images and pages are between the two containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Images {
    /// In memory, and nowhere else.
    #[default]
    Cache,
    /// In a directory on each side's storage, as a checkpoint is.
    Disk,
}

impl Images {
    /// Both, in the order `--help` shows them.
    pub const ALL: [Self; 2] = [Self::Cache, Self::Disk];

    /// Returns the name used in requests and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Disk => "disk",
        }
    }
}

impl fmt::Display for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Images {
    type Err = RequestError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|images| images.name() == name);
        known.ok_or_else(|| RequestError::BadValue {
            key: "images".to_owned(),
            value: name.to_owned(),
            expected: "cache or disk",
        })
    }
}

/// What bounds a migration, and how it may spend what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime that rounds of pre-copy aim at, in milliseconds.
    pub downtime_limit_ms: u32,
    /// After so many seconds of rounds the best switchover is taken, or the migration given up.
    pub timeout_s: u32,
    /// Most rounds of pre-copy.
    pub max_rounds: u32,
    /// A page that was written in so many rounds running is left to the switchover; 0 leaves none.
    pub hot_threshold: u32,
    /// Bulk streams; `None` takes what suits the processors.
    pub streams: Option<u8>,
    /// Whether `auto` may leave pages to travel after the container runs on the target.
    pub allow_postcopy: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime_limit_ms: 300,
            timeout_s: 300,
            max_rounds: 30,
            hot_threshold: 3,
            streams: None,
            allow_postcopy: false,
        }
    }
}

/// The name of one migration, chosen by whoever asks for it: 1 to 64 of `[A-Za-z0-9._-]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(String);

impl MigrationId {
    /// The longest accepted name, in bytes.
    pub const LEN_MAX: usize = 64;

    /// Returns the name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for MigrationId {
    type Error = RequestError;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        let well_formed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        // A leading dot would let a peer choose "." or ".." where the name becomes part of a path.
        if id.is_empty() || id.len() > Self::LEN_MAX || id.starts_with('.') || !id.bytes().all(well_formed) {
            return Err(RequestError::BadMigrationId { id });
        }
        Ok(Self(id))
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.0
    }
}

/// A migration as a client asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationRequest {
    /// Name or address of the target, without brackets.
    pub host: String,
    /// Port of the target's agent.
    pub port: u16,
    /// When pages travel.
    pub mode: Mode,
    /// Where images and pages are on their way.
    pub images: Images,
    /// What bounds the migration.
    pub limits: Limits,
    /// The migration's name, if the client chose one.
    pub migration: Option<MigrationId>,
    /// Whether the source keeps the stopped container's record and snapshot.
    pub keep: bool,
    /// Whether only the preflight of both sides is run.
    pub dry_run: bool,
}

/// A request that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The text is no `godwit://` URI.
    #[error("`{text}` is not a migration request: expected godwit://HOST[:PORT][?mode=auto]")]
    NotARequest {
        /// What was given.
        text: String,
    },
    /// The host is missing or malformed.
    #[error("bad target `{target}`: expected HOST[:PORT] or [IPV6][:PORT]")]
    BadTarget {
        /// What was given.
        target: String,
    },
    /// The mode is not one of [`Mode::ALL`].
    #[error("unknown mode `{mode}`: expected auto, native, precopy, postcopy or hybrid")]
    UnknownMode {
        /// What was given.
        mode: String,
    },
    /// The key is none that a request may carry, or is given twice.
    #[error(
        "unknown or repeated key `{key}`: expected mode, images, streams, max_rounds, downtime_limit_ms, timeout_s, \
         hot_threshold, allow_postcopy, migration, keep or dry_run, each once"
    )]
    BadKey {
        /// What was given.
        key: String,
    },
    /// A value is none that its key may have.
    #[error("bad value `{value}` for `{key}`: expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What it may have.
        expected: &'static str,
    },
    /// The migration's name is malformed.
    #[error(
        "bad migration name `{id}`: expected 1 to 64 of letters, digits, '.', '_' and '-', not led by '.'"
    )]
    BadMigrationId {
        /// What was given.
        id: String,
    },
}

impl MigrationRequest {
    /// Returns a request for a migration to `target` (`HOST[:PORT]`) with every default, and every switch off.
    ///
    /// # Errors
    /// [`RequestError::BadTarget`] if `target` is no host with an optional port.
    pub fn to_target(target: &str) -> Result<Self, RequestError> {
        let (host, port) = parse_target(target)?;
        Ok(Self {
            host,
            port,
            mode: Mode::Auto,
            images: Images::default(),
            limits: Limits::default(),
            migration: None,
            keep: false,
            dry_run: false,
        })
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), RequestError> {
        let limits = &mut self.limits;
        match key {
            "mode" => self.mode = value.parse()?,
            "images" => self.images = value.parse()?,
            "streams" => limits.streams = Some(parse_number(key, value, 1..=64, "1 to 64")?),
            "max_rounds" => limits.max_rounds = parse_number(key, value, 1..=1000, "1 to 1000")?,
            "downtime_limit_ms" => {
                limits.downtime_limit_ms = parse_number(key, value, 1..=3_600_000, "1 to 3600000")?;
            }
            "timeout_s" => limits.timeout_s = parse_number(key, value, 1..=86_400, "1 to 86400")?,
            "hot_threshold" => limits.hot_threshold = parse_number(key, value, 0..=1000, "0 to 1000")?,
            "allow_postcopy" => limits.allow_postcopy = parse_switch(key, value)?,
            "migration" => self.migration = Some(value.to_owned().try_into()?),
            "keep" => self.keep = parse_switch(key, value)?,
            "dry_run" => self.dry_run = parse_switch(key, value)?,
            _ => return Err(RequestError::BadKey { key: key.to_owned() }),
        }
        Ok(())
    }

    /// Tells whether `text` asks for a migration rather than naming a directory.
    #[must_use]
    pub fn is_request(text: &str) -> bool {
        text.starts_with(SCHEME)
    }
}

impl FromStr for MigrationRequest {
    type Err = RequestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest =
            text.strip_prefix(SCHEME).ok_or_else(|| RequestError::NotARequest { text: text.to_owned() })?;
        let (target, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut request = Self::to_target(target.strip_suffix('/').unwrap_or(target))?;
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(RequestError::BadKey { key: key.to_owned() });
            }
            seen.push(key);
            request.take(key, value)?;
        }
        Ok(request)
    }
}

impl fmt::Display for MigrationRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
        write!(f, "{SCHEME}{open}{host}{close}:{}?mode={}", self.port, self.mode)?;
        if self.images != Images::default() {
            write!(f, "&images={}", self.images)?;
        }
        let (limits, usual) = (&self.limits, Limits::default());
        if let Some(streams) = limits.streams {
            write!(f, "&streams={streams}")?;
        }
        for (key, value, usual) in [
            ("max_rounds", limits.max_rounds, usual.max_rounds),
            ("downtime_limit_ms", limits.downtime_limit_ms, usual.downtime_limit_ms),
            ("timeout_s", limits.timeout_s, usual.timeout_s),
            ("hot_threshold", limits.hot_threshold, usual.hot_threshold),
        ] {
            if value != usual {
                write!(f, "&{key}={value}")?;
            }
        }
        if let Some(id) = &self.migration {
            write!(f, "&migration={id}")?;
        }
        for (key, on) in
            [("allow_postcopy", limits.allow_postcopy), ("keep", self.keep), ("dry_run", self.dry_run)]
        {
            if on {
                write!(f, "&{key}=1")?;
            }
        }
        Ok(())
    }
}

fn parse_switch(key: &str, value: &str) -> Result<bool, RequestError> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(bad_value(key, value, "0 or 1")),
    }
}

fn parse_number<T>(
    key: &str,
    value: &str,
    allowed: RangeInclusive<T>,
    expected: &'static str,
) -> Result<T, RequestError>
where
    T: FromStr + PartialOrd,
{
    let number = value.parse().ok().filter(|number| allowed.contains(number));
    number.ok_or_else(|| bad_value(key, value, expected))
}

fn bad_value(key: &str, value: &str, expected: &'static str) -> RequestError {
    RequestError::BadValue { key: key.to_owned(), value: value.to_owned(), expected }
}

fn parse_target(target: &str) -> Result<(String, u16), RequestError> {
    let bad = || RequestError::BadTarget { target: target.to_owned() };
    let (host, port) = if let Some(rest) = target.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
        host.parse::<Ipv6Addr>().map_err(|_| bad())?;
        (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(bad)?) })
    } else {
        target.split_once(':').map_or((target, None), |(host, port)| (host, Some(port)))
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port.parse().ok().filter(|&port| port != 0).ok_or_else(bad)?,
    };
    let well_formed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || !host.bytes().all(well_formed) {
        return Err(bad());
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MigrationRequest, RequestError> {
        text.parse()
    }

    #[test]
    fn a_bare_target_takes_the_defaults() {
        let request = parse("godwit://node-b").unwrap();
        assert_eq!((request.host.as_str(), request.port), ("node-b", DEFAULT_PORT));
        assert!(!request.keep && !request.dry_run);
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in [
            "godwit://node-b:1234?mode=native&migration=a-1&keep=1&dry_run=1",
            "godwit://[fd00::2]:7450?mode=native",
            "godwit://10.0.0.2:7450?mode=native&keep=1",
            "godwit://b:1?mode=hybrid&images=disk&streams=4&max_rounds=3&downtime_limit_ms=50&timeout_s=9&hot_threshold=0&allow_postcopy=1",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let text = |text: &str| parse(text).unwrap_err().to_string();
        assert!(text("godwit://b?mode=teleport").contains("`teleport`"));
        assert!(text("godwit://b?mod=native").contains("`mod`"));
        assert!(text("godwit://b?keep=1&keep=0").contains("`keep`"));
        assert!(text("godwit://b?keep=yes").contains("`yes`"));
        assert!(text("godwit://b?streams=0").contains("1 to 64"));
        assert!(text("godwit://b?streams=65").contains("`65`"));
        assert!(text("godwit://b?max_rounds=-1").contains("`max_rounds`"));
        assert!(text("godwit://b?images=tape").contains("cache or disk"));
        assert!(text("godwit://b:0").contains("b:0"));
        assert!(text("godwit://b:port").contains("b:port"));
        assert!(text("godwit://").contains("bad target"));
        assert!(text("godwit://[::1").contains("[::1"));
        assert!(text("godwit://b?migration=../x").contains("../x"));
        assert!(text("/var/lib/x").contains("/var/lib/x"));
    }
}
