//! What a connection string says of TLS, which the driver does not know, or not all of it.

use percent_encoding::percent_decode_str;
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

/// Takes what we read ourselves out of a connection string, and leaves the rest to the driver.
pub(crate) fn split(text: &str) -> Result<(String, Asked)> {
    let scheme = ["postgres://", "postgresql://"].into_iter().find(|scheme| text.starts_with(scheme));
    let read = scheme.map_or_else(|| of_pairs(text), |scheme| of_url(text, scheme.len()));
    // What we do not understand is the driver's to refuse.
    let (rest, taken) = read.unwrap_or_else(|| (text.to_owned(), vec![]));
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
            return Err(Error::invalid("sslmode is disable, prefer, require, verify-ca or verify-full"));
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

type Taken = Vec<(&'static str, String)>;

fn ours(key: &str) -> Option<&'static str> {
    [MODE, ROOT, CERTIFICATE, KEY].into_iter().find(|k| *k == key)
}

/// `None` if nothing is there to be taken.
fn of_url(text: &str, start: usize) -> Option<(String, Taken)> {
    // As the driver has it, user and password end at the first `@`: a password may contain a `?`.
    let host = text[start..].find('@').map_or(start, |at| start + at);
    let (head, query) = text.split_at(host + text[host..].find('?')?);
    let mut taken = Vec::new();
    let mut kept = Vec::new();
    for pair in query[1..].split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match ours(&percent_decode_str(key).decode_utf8().ok()?) {
            Some(key) => taken.push((key, percent_decode_str(value).decode_utf8().ok()?.into_owned())),
            None => kept.push(pair),
        }
    }
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    Some((format!("{head}{query}"), taken))
}

/// `None` if the text is not made of keys and values.
fn of_pairs(text: &str) -> Option<(String, Taken)> {
    let mut taken = Vec::new();
    let mut kept = String::new();
    let mut tail = text.trim_start();
    while !tail.is_empty() {
        let (key, after) = tail.split_once('=')?;
        let after = after.trim_start();
        let (value, rest) = value(after)?;
        match ours(key.trim_end()) {
            Some(key) => taken.push((key, value)),
            None => kept = format!("{kept}{} ", &tail[..tail.len() - rest.len()]),
        }
        tail = rest.trim_start();
    }
    Some((kept, taken))
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
