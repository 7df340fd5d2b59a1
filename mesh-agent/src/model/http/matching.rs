//! What a rule asks of a request.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::Name;

/// All of it must be so.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HttpMatch {
    /// Of the path alone, without its query.
    pub path: Option<PathMatch>,
    /// Compares exact paths and prefixes without regard to the case of ASCII letters.
    pub ignore_path_case: bool,
    pub method: Option<ValueMatch>,
    pub scheme: Option<ValueMatch>,
    /// Host and port as the client has written them.
    pub authority: Option<ValueMatch>,
    pub headers: Vec<(Name, ValueMatch)>,
    /// None of these may match.
    pub without_headers: Vec<(Name, ValueMatch)>,
    /// Names and values as they stand in the URL; the first of a name counts.
    pub query: Vec<(Arc<str>, ValueMatch)>,
    pub source: SourceMatch,
}

/// Who may ask. Empty means everybody.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct SourceMatch {
    pub namespace: Option<Arc<str>>,
    /// The client's pod has all of these labels.
    pub labels: Vec<(Arc<str>, Arc<str>)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathMatch {
    Exact(Arc<str>),
    /// By letters: `/sh` is a prefix of `/shop`. Istio's.
    Prefix(Arc<str>),
    /// By whole elements: `/shop` and `/shop/` are prefixes of `/shop` and `/shop/cart`, not of `/shopping`. Written here
    /// without the slash at its end; the empty text matches everything. The Gateway API's.
    Elements(Arc<str>),
    /// The whole path.
    Pattern(Pattern),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueMatch {
    Exact(Arc<str>),
    /// Without regard to the case of ASCII letters, as hosts are compared.
    ExactIgnoringCase(Arc<str>),
    Prefix(Arc<str>),
    /// The whole value.
    Pattern(Pattern),
    /// It is there, whatever it says.
    Present,
}

/// A regular expression that must match a whole text. It takes linear time, whatever it says: no look-around, no
/// back-references, as in Envoy's RE2.
#[derive(Clone, Serialize)]
#[serde(into = "String")]
pub struct Pattern {
    text: Arc<str>,
    whole: regex::Regex,
    /// For replacements, which take every place that matches.
    part: regex::Regex,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("`{0}` is no regular expression that RE2 knows: {1}")]
    Syntax(String, String),
    #[error("`{0}` makes too large a program: write it without large repetitions")]
    TooLarge(String),
}

/// A program of this many bytes is more likely an attack than a route.
const MAX_PROGRAM: usize = 256 * 1024;

impl Pattern {
    pub fn new(text: &str) -> Result<Self, PatternError> {
        let build = |written: &str| {
            regex::RegexBuilder::new(written).size_limit(MAX_PROGRAM).dfa_size_limit(MAX_PROGRAM).build().map_err(|e| {
                match e {
                    regex::Error::CompiledTooBig(_) => PatternError::TooLarge(text.to_owned()),
                    // Several lines, of which the last says it.
                    e => {
                        let words = e.to_string();
                        let last = words.lines().last().unwrap_or_default();
                        let last = last.trim_start_matches("error: ").to_owned();
                        PatternError::Syntax(text.to_owned(), last)
                    }
                }
            })
        };
        // Alone first: `a)(b` would be one in the brackets.
        let part = build(text)?;
        Ok(Self { text: text.into(), whole: build(&format!("^(?:{text})$"))?, part })
    }

    pub fn matches(&self, text: &str) -> bool {
        self.whole.is_match(text)
    }

    /// Every place that matches, with `by` in its place: `\1` in it is what the first group has matched, as in RE2.
    pub fn replace_all(&self, text: &str, by: &str) -> String {
        let replace = |found: &regex::Captures<'_>| {
            let mut out = String::new();
            let mut letters = by.chars();
            while let Some(letter) = letters.next() {
                match letter {
                    '\\' => match letters.next() {
                        Some(digit) if digit.is_ascii_digit() => {
                            let group = found.get(digit as usize - '0' as usize);
                            out.push_str(group.map(|g| g.as_str()).unwrap_or_default());
                        }
                        other => out.extend(other),
                    },
                    letter => out.push(letter),
                }
            }
            out
        };
        self.part.replace_all(text, replace).into_owned()
    }

    /// How many groups it has.
    pub fn groups(&self) -> usize {
        self.part.captures_len() - 1
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.text.to_string()
    }
}

impl PathMatch {
    /// `/shop` and `/shop/` are one.
    pub fn elements(prefix: &str) -> Self {
        Self::Elements(prefix.strip_suffix('/').unwrap_or(prefix).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_about_the_whole_text() {
        let pattern = Pattern::new("/a|/b+").unwrap();
        for (text, expected) in [("/a", true), ("/bbb", true), ("/ab", false), ("x/a", false), ("/a\n", false)] {
            assert_eq!(pattern.matches(text), expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused_in_one_line() {
        for text in ["(", "a)(b", r"(a)\1", "(?=x)", "[z-a]", "*"] {
            let error = Pattern::new(text).unwrap_err();
            assert!(matches!(error, PatternError::Syntax(..)), "{text}: {error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        assert!(matches!(Pattern::new("((a{1000}){1000}){1000}"), Err(PatternError::TooLarge(_))));
    }

    #[test]
    fn a_replacement_may_name_groups() {
        let pattern = Pattern::new("^/service/([^/]+)(/.*)$").unwrap();
        assert_eq!(pattern.groups(), 2);
        assert_eq!(pattern.replace_all("/service/foo/v1/api", r"\2/instance/\1"), "/v1/api/instance/foo");
        assert_eq!(Pattern::new("one").unwrap().replace_all("/xxx/one/yyy/one", "two"), "/xxx/two/yyy/two");
        assert_eq!(Pattern::new("(?i)/aAa").unwrap().replace_all("/AAA/x", "/$1\\\\"), "/$1\\/x");
    }
}
