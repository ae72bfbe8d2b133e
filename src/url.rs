//! What a connection string says: what the driver takes of it, what it says of TLS, which the driver does not know, or not
//! all of it, and what is wrong with it. No error quotes more of one than the name of a key.

use percent_encoding::percent_decode_str;
use postgres::Config;
use postgres::config::SslMode;

use crate::error::{Error, Result};

/// How much of the server's certificate is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Check {
    #[default]
    Nothing,
    /// That an authority we trust has signed it, and that it is valid now.
    Chain,
    /// That it is for the host that we wanted, too.
    Host,
}

/// What a connection string asks for.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// As far as the driver knows it.
    pub(crate) mode: Option<SslMode>,
    pub(crate) check: Check,
    /// The file of the authorities' certificates, or `system`.
    pub(crate) root: Option<String>,
    /// The files of the client's own certificate and key.
    #[cfg_attr(not(feature = "rustls"), allow(dead_code, reason = "nothing encrypts"))]
    pub(crate) identity: (Option<String>, Option<String>),
}

const MODE: &str = "sslmode";
const ROOT: &str = "sslrootcert";
const CERTIFICATE: &str = "sslcert";
const KEY: &str = "sslkey";

/// The keys that the driver takes, and which values of them.
const KEYS: [(&str, &str); 18] = [
    ("user", ""),
    ("password", ""),
    ("dbname", ""),
    ("options", ""),
    ("application_name", ""),
    ("host", "names or addresses with commas between, IPv6 in brackets"),
    ("hostaddr", "addresses with commas between"),
    ("port", "numbers up to 65535 with commas between"),
    ("connect_timeout", "a number of seconds"),
    ("tcp_user_timeout", "a number of seconds"),
    ("keepalives", "0 or 1"),
    ("keepalives_idle", "a number of seconds"),
    ("keepalives_interval", "a number of seconds"),
    ("keepalives_retries", "a number"),
    ("target_session_attrs", "any, read-write or read-only"),
    ("channel_binding", "disable, prefer or require"),
    ("load_balance_hosts", "disable or random"),
    ("sslnegotiation", "postgres or direct"),
];

/// What other clients take in a URL, and what it is called here.
const INSTEAD: [(&str, &str); 7] = [
    ("pgbouncer", "Builder::pooler"),
    ("schema", "Builder::schema"),
    ("currentSchema", "Builder::schema"),
    ("search_path", "Builder::schema"),
    ("connection_limit", "Builder::pool_size"),
    ("pool_timeout", "Builder::operation_timeout"),
    ("statement_timeout", "Builder::operation_timeout"),
];

/// Reads a connection string. White space around it, as of a file's last line, is not part of it.
pub(crate) fn read(text: &str) -> Result<(Config, Asked)> {
    let text = text.trim_start();
    // Behind a backslash, white space may be the end of a value.
    let text = if scheme(text).is_some() { text.trim_end() } else { text };
    check_form(text)?;
    let (rest, asked) = split(text)?;
    // The words of the parser may quote a part of the text, and so the password.
    let mut config = rest.parse::<Config>().map_err(|e| {
        let cause = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
        let key = KEYS.iter().find(|(key, values)| !values.is_empty() && cause.contains(&format!("`{key}`")));
        Error::invalid(match key {
            Some((key, values)) => format!("{key} in the connection string must be {values}"),
            None => format!("the connection string cannot be read; {ESCAPE}"),
        })
    })?;
    if let Some(mode) = asked.mode {
        config.ssl_mode(mode);
    }
    Ok((config, asked))
}

/// What makes most of the strings that nobody understands.
const ESCAPE: &str = "special characters are percent-encoded in a URL, and quoted in a value of a key";

/// What a URL of ours begins with.
fn scheme(text: &str) -> Option<&'static str> {
    ["postgres://", "postgresql://"].into_iter().find(|scheme| text.starts_with(scheme))
}

fn check_form(text: &str) -> Result<()> {
    if text.trim_end().is_empty() {
        return Err(Error::invalid("the connection string is empty"));
    }
    if scheme(text).is_some() {
        return Ok(());
    }
    let is_scheme =
        |s: &str| s.len() <= 32 && s.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:".contains(c));
    match text.split_once("://") {
        Some((other, _)) if is_scheme(other) => Err(Error::invalid(format!(
            "a URL of the database begins with postgres:// or postgresql://, not {other}://"
        ))),
        _ if !text.contains('=') => Err(Error::invalid(
            "the connection string is neither a URL, as postgres://user@host/database, nor keys with values, as host=.. user=..",
        )),
        _ => Ok(()),
    }
}

/// What was found in a connection string.
#[derive(Default)]
struct Found {
    /// For the driver.
    rest: String,
    taken: Vec<(&'static str, String)>,
    /// A key that neither knows; empty if it cannot be told from a part of a password.
    unknown: Option<String>,
}

impl Found {
    /// Notes a key that is not ours.
    fn check(&mut self, key: &str, may_be_secret: bool) {
        if self.unknown.is_none() && !KEYS.iter().any(|(known, _)| *known == key) {
            let is_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            let shown = !may_be_secret && key.len() <= 64 && key.chars().all(is_name);
            self.unknown = Some(if shown { key.to_owned() } else { String::new() });
        }
    }
}

/// Takes what we read ourselves out of a connection string, and leaves the rest to the driver.
fn split(text: &str) -> Result<(String, Asked)> {
    let read = scheme(text).map_or_else(|| of_pairs(text), |scheme| of_url(text, scheme.len()));
    // What we do not understand is the driver's to refuse.
    let Found { rest, taken, unknown } =
        read.unwrap_or_else(|| Found { rest: text.to_owned(), ..Found::default() });
    if let Some(key) = unknown {
        return Err(Error::invalid(match INSTEAD.iter().find(|(other, _)| *other == key) {
            _ if key.is_empty() => format!("the connection string has an unknown key; {ESCAPE}"),
            Some((_, method)) => format!("unknown key {key} in the connection string; use {method}"),
            None => format!("unknown key {key} in the connection string"),
        }));
    }
    // The last one counts, and an empty one is none.
    let last = |key| taken.iter().rfind(|(k, _)| *k == key).map(|(_, v)| v.clone()).filter(|v| !v.is_empty());
    let (mode, check) = match last(MODE).as_deref() {
        None => (None, Check::Nothing),
        Some("disable") => (Some(SslMode::Disable), Check::Nothing),
        Some("prefer") => (Some(SslMode::Prefer), Check::Nothing),
        Some("require") => (Some(SslMode::Require), Check::Nothing),
        Some("verify-ca") => (Some(SslMode::Require), Check::Chain),
        Some("verify-full") => (Some(SslMode::Require), Check::Host),
        Some(_) => {
            let modes = "disable, prefer, require, verify-ca or verify-full";
            return Err(Error::invalid(format!("sslmode in the connection string must be {modes}")));
        }
    };
    let mut asked = Asked { mode, check, root: last(ROOT), identity: (last(CERTIFICATE), last(KEY)) };
    // Anybody may have a certificate of a public authority: what counts is for which host.
    if asked.root.as_deref() == Some("system") && asked.check != Check::Host {
        if asked.mode.is_some() {
            return Err(Error::invalid("sslrootcert=system goes with sslmode=verify-full only"));
        }
        (asked.mode, asked.check) = (Some(SslMode::Require), Check::Host);
    }
    Ok((rest, asked))
}

fn ours(key: &str) -> Option<&'static str> {
    [MODE, ROOT, CERTIFICATE, KEY].into_iter().find(|k| *k == key)
}

/// `None` if nothing is there to be taken.
fn of_url(text: &str, start: usize) -> Option<Found> {
    // As the driver has it, user and password end at the first `@`: a password may contain a `?`.
    let host = text[start..].find('@').map_or(start, |at| start + at);
    let (head, query) = text.split_at(host + text[host..].find('?')?);
    let mut found = Found::default();
    let mut kept = Vec::new();
    // A password with a `@` in it, or one behind which there is none, ends up here.
    let is_port = |port: &str| port.chars().all(|c| c.is_ascii_digit());
    let hosts = head[host..].split('/').next().unwrap_or_default().split(',');
    let may_be_secret = query.contains('@')
        || hosts.filter_map(|one| one.rsplit_once(':')).any(|(_, port)| !is_port(port.trim_end_matches(']')));
    for pair in query[1..].split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = percent_decode_str(key).decode_utf8().ok()?;
        match ours(&key) {
            Some(key) => found.taken.push((key, percent_decode_str(value).decode_utf8().ok()?.into_owned())),
            None => {
                found.check(&key, may_be_secret);
                kept.push(pair);
            }
        }
    }
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    found.rest = format!("{head}{query}");
    Some(found)
}

/// `None` if the text is not made of keys and values.
fn of_pairs(text: &str) -> Option<Found> {
    let mut found = Found::default();
    let mut may_be_secret = false;
    let mut tail = text.trim_start();
    while !tail.is_empty() {
        let (key, after) = tail.split_once('=')?;
        let after = after.trim_start();
        let (value, rest) = value(after)?;
        let key = key.trim_end();
        match ours(key) {
            Some(key) => found.taken.push((key, value)),
            None => {
                found.check(key, may_be_secret);
                found.rest = format!("{}{} ", found.rest, &tail[..tail.len() - rest.len()]);
            }
        }
        // A space in a password without quotes makes the rest of it look like a key.
        may_be_secret = key == "password" && !after.starts_with('\'');
        tail = rest.trim_start();
    }
    Some(found)
}

/// A value, and what comes after it. It ends with its quote, else at a space; a backslash takes the next
/// character as it is.
fn value(text: &str) -> Option<(String, &str)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' if quoted => return Some((value, &text[at + 1..])),
            c if c.is_whitespace() && !quoted => return Some((value, &text[at..])),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[track_caller]
    fn check(text: &str, rest: &str, mode: Option<SslMode>, check: Check, root: Option<&str>) {
        let (left, asked) = split(text).unwrap();
        assert_eq!(left, rest, "{text}");
        assert_eq!((asked.mode, asked.check, asked.root.as_deref()), (mode, check, root), "{text}");
    }

    const REQUIRE: Option<SslMode> = Some(SslMode::Require);

    #[test]
    fn is_taken_out_of_a_url() {
        for url in ["postgres://h/d", "postgres://", "postgres://u:p%26@h/d?application_name=a%26b&user=c"] {
            check(url, url, None, Check::Nothing, None);
        }
        check("postgresql://h/d?sslmode=verify-full", "postgresql://h/d", REQUIRE, Check::Host, None);
        check(
            "postgres://u:p@h/d?user=a&sslrootcert=%2Fa%20b%26.pem&sslmode=verify-ca&dbname=x%20y",
            "postgres://u:p@h/d?user=a&dbname=x%20y",
            REQUIRE,
            Check::Chain,
            Some("/a b&.pem"),
        );
        // An escaped key, the last of two, and an empty value, which is none.
        check("postgres://h?ssl%6dode=disable", "postgres://h", Some(SslMode::Disable), Check::Nothing, None);
        check("postgres://h?sslmode=disable&sslmode=require", "postgres://h", REQUIRE, Check::Nothing, None);
        check("postgres://h?sslmode=&sslrootcert=", "postgres://h", None, Check::Nothing, None);
        // A password that looks like parameters.
        for url in ["postgres://u:p?sslmode=disable&x=y@h/d", "postgres://u:p=' sslmode=disable@h/d"] {
            check(url, url, None, Check::Nothing, None);
            check(&format!("{url}?sslmode=require"), url, REQUIRE, Check::Nothing, None);
        }
    }

    #[test]
    fn is_taken_out_of_keys_and_values() {
        for text in ["", "host=h user = 'a b' ", "password='sslmode=disable' ", r"password=\'\ sslmode=a "] {
            check(text, text, None, Check::Nothing, None);
        }
        check(
            r"host=h sslmode = verify-full sslrootcert='/a\'b c\\.pem' user='x y'",
            "host=h user='x y' ",
            REQUIRE,
            Check::Host,
            Some(r"/a'b c\.pem"),
        );
        check(r"sslrootcert=/a\ b sslmode=prefer", "", Some(SslMode::Prefer), Check::Nothing, Some("/a b"));
        check("sslmode='require'host=h", "host=h ", REQUIRE, Check::Nothing, None);
        // What the driver cannot read either.
        for text in ["host='h sslmode=require", "sslmode", "host h=x sslmode"] {
            check(text, text, None, Check::Nothing, None);
        }
    }

    #[test]
    fn public_authorities_vouch_for_a_host_only() {
        check("host=h sslrootcert=system", "host=h ", REQUIRE, Check::Host, Some("system"));
        for mode in ["disable", "prefer", "require", "verify-ca"] {
            let error = split(&format!("sslrootcert=system sslmode={mode}")).unwrap_err();
            assert!(error.to_string().contains("verify-full only"), "{error}");
        }
    }

    #[track_caller]
    fn refused(text: &str) -> String {
        let error = read(text).map(drop).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter"), "{shown}");
        error.to_string()
    }

    #[test]
    fn an_unknown_key_is_named() {
        for (text, words) in [
            (
                "postgres://u:hunter2@h/d?pgbouncer=true",
                "unknown key pgbouncer in the connection string; use Builder::pooler",
            ),
            (
                "postgres://h:5432/d?schema=public",
                "unknown key schema in the connection string; use Builder::schema",
            ),
            ("postgres://[::1]:5432/d?sslmode=require&connection_limit=5", "use Builder::pool_size"),
            (
                "postgresql://u:hunter%2F2@h,i:1/?application_name=a&gssencmode=disable",
                "unknown key gssencmode in",
            ),
            ("postgres://h?pgbouncer", "unknown key pgbouncer in"),
            ("postgres://h?%73chema=x", "unknown key schema in"),
            ("host=h passfile=hunter2 user=u", "unknown key passfile in the connection string"),
            ("host=h password='hunter 2' schema = x", "unknown key schema in"),
            // A part of a password may look like a key.
            (
                "postgres://u:h@hunter2?hunter3=x@h/d",
                "an unknown key; special characters are percent-encoded",
            ),
            ("postgres://u:x?hunter2=x", "an unknown key; special"),
            ("host=h password=a hunter2=x", "an unknown key; special"),
            ("host=h password=a hunter 2=x user=u", "an unknown key; special"),
        ] {
            let error = refused(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_is_refused_with_what_can() {
        for (key, value, words) in [
            ("target_session_attrs", "primary", "any, read-write or read-only"),
            ("target_session_attrs", "", "any, read-write or read-only"),
            ("connect_timeout", "hunter2", "a number of seconds"),
            ("tcp_user_timeout", "1s", "a number of seconds"),
            ("port", "70000", "up to 65535"),
            ("hostaddr", "hunter2", "addresses with commas between"),
            ("keepalives", "yes", "0 or 1"),
            ("keepalives_idle", "1m", "a number of seconds"),
            ("keepalives_interval", "1m", "a number of seconds"),
            ("keepalives_retries", "-1", "a number"),
            ("channel_binding", "hunter2", "disable, prefer or require"),
            ("load_balance_hosts", "yes", "disable or random"),
            ("sslnegotiation", "yes", "postgres or direct"),
            ("sslmode", "hunter2", "disable, prefer, require, verify-ca or verify-full"),
        ] {
            for text in [format!("postgres://u:hunter2@h/d?{key}={value}"), format!("host=h {key}='{value}'")]
            {
                let error = refused(&text);
                let (start, rest) = error.split_once(" must be ").unwrap_or((&error, ""));
                assert_eq!(start, format!("{key} in the connection string"), "{text}");
                assert!(rest.contains(words), "{text}: {error}");
            }
        }
        assert!(
            refused("postgres://u:hunter2@h:hunter3/d").starts_with("port in the connection string must be")
        );
        assert!(refused("postgres://u:hunter2@[::1/d").starts_with("host in the connection string must be"));
    }

    #[test]
    fn what_is_no_connection_string_is_refused() {
        for (text, words) in [
            ("", "the connection string is empty"),
            (" \n", "the connection string is empty"),
            ("mysql://u:hunter2@h/d", "begins with postgres:// or postgresql://, not mysql://"),
            ("jdbc:postgresql://h/d", "not jdbc:postgresql://"),
            ("postgresql+psycopg2://u:hunter2@h/d", "not postgresql+psycopg2://"),
            ("Postgres://h/d", "not Postgres://"),
            ("localhost:5432/d", "neither a URL"),
            ("hunter2", "neither a URL"),
            ("host=h hunter2", "cannot be read"),
            ("host=h password='hunter2", "cannot be read"),
        ] {
            let error = refused(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn white_space_around_is_not_part_of_it() {
        let password =
            |text: &str| read(text).unwrap().0.get_password().map(|p| String::from_utf8(p.to_vec()).unwrap());
        for text in ["postgres://u:p@h/d", "host=h user=u password=p dbname=d", "postgres://u@h/d?password=p"]
        {
            for text in [format!("{text}\n"), format!(" \t{text}\r\n\n"), text.to_owned()] {
                let (config, _) = read(&text).unwrap();
                assert_eq!((config.get_user(), config.get_dbname()), (Some("u"), Some("d")), "{text:?}");
                assert_eq!(password(&text).as_deref(), Some("p"), "{text:?}");
            }
        }
        assert_eq!(
            read("postgres://h/d?target_session_attrs=read-write\n").unwrap().0.get_dbname(),
            Some("d")
        );
        assert_eq!(password("host=h password=a\\ ").as_deref(), Some("a "), "behind a backslash");
    }

    /// Only a value that begins with a quote ends with one.
    #[test]
    fn a_quote_within_a_value_is_part_of_it() {
        check("password=a'b sslmode=require host=h", "password=a'b host=h ", REQUIRE, Check::Nothing, None);
        check(
            "password='a b' sslmode='require' host=h",
            "password='a b' host=h ",
            REQUIRE,
            Check::Nothing,
            None,
        );
    }

    #[test]
    fn an_unknown_mode_is_refused_without_quoting_it() {
        let error = split("postgres://h?sslmode=hunter2").unwrap_err();
        assert!(
            error.to_string().contains("verify-full") && !error.to_string().contains("hunter2"),
            "{error}"
        );
    }
}
