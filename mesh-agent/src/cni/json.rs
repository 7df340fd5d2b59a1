//! Where a value stands in the text of a JSON document, so that it can be cut out or printed again byte by byte.
//!
//! For text that serde_json has taken already: what is no JSON gives no place, or a wrong one, but never a panic.

use std::ops::Range;

/// The place of the value that the outermost object has under `key`; the last one where it has several, as for Go's parser.
pub(super) fn member(text: &str, key: &str) -> Option<Range<usize>> {
    let mut scan = Scan { text, at: 0 };
    scan.expect(b'{')?;
    let mut found = None;
    while scan.peek()? != b'}' {
        let name = scan.value()?;
        scan.expect(b':')?;
        let value = scan.value()?;
        // A key may be written with escapes.
        if serde_json::from_str::<String>(text.get(name)?).is_ok_and(|name| name == key) {
            found = Some(value);
        }
        if scan.peek()? == b',' {
            scan.at += 1;
        }
    }
    found
}

/// The places of the elements of the array at `array`.
pub(super) fn elements(text: &str, array: Range<usize>) -> Option<Vec<Range<usize>>> {
    let mut scan = Scan { text: text.get(..array.end)?, at: array.start };
    scan.expect(b'[')?;
    let mut found = Vec::new();
    while scan.peek()? != b']' {
        found.push(scan.value()?);
        if scan.peek()? == b',' {
            scan.at += 1;
        }
    }
    Some(found)
}

struct Scan<'a> {
    text: &'a str,
    at: usize,
}

impl Scan<'_> {
    /// The next byte that is no white space.
    fn peek(&mut self) -> Option<u8> {
        let rest = self.text.as_bytes().get(self.at..)?;
        self.at += rest.iter().position(|b| !b.is_ascii_whitespace())?;
        self.text.as_bytes().get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    /// Passes over one value.
    fn value(&mut self) -> Option<Range<usize>> {
        let first = self.peek()?;
        let start = self.at;
        let bytes = self.text.as_bytes();
        match first {
            b'"' => self.string()?,
            b'{' | b'[' => {
                let mut depth = 0usize;
                loop {
                    match bytes.get(self.at)? {
                        b'"' => {
                            self.string()?;
                            continue;
                        }
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => depth -= 1,
                        _ => {}
                    }
                    self.at += 1;
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => {
                let rest = &bytes[start..];
                let ends = |b: &u8| matches!(b, b',' | b'}' | b']' | b':') || b.is_ascii_whitespace();
                let length = rest.iter().position(ends).unwrap_or(rest.len());
                // A comma where a value should be: no JSON.
                (length > 0).then_some(())?;
                self.at += length;
            }
        }
        Some(start..self.at)
    }

    fn string(&mut self) -> Option<()> {
        let bytes = self.text.as_bytes();
        self.at += 1;
        loop {
            match bytes.get(self.at)? {
                b'\\' => self.at += 2,
                b'"' => {
                    self.at += 1;
                    return Some(());
                }
                _ => self.at += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_as_they_are_written() {
        let text =
            r#" { "a" : { "b": "}\"]" , "plugins": [9] }, "n":1.50e2 ,"plugins" : [ {"x":[1,"]"]} , null,[ ] ] } "#;
        assert_eq!(&text[member(text, "a").unwrap()], r#"{ "b": "}\"]" , "plugins": [9] }"#);
        assert_eq!(&text[member(text, "n").unwrap()], "1.50e2");
        let all = elements(text, member(text, "plugins").unwrap()).unwrap();
        let all: Vec<&str> = all.into_iter().map(|place| &text[place]).collect();
        assert_eq!(all, [r#"{"x":[1,"]"]}"#, "null", "[ ]"]);
        assert_eq!(member(text, "b"), None, "only the outermost object is looked at");
        assert_eq!(&r#"{"k":1,"\u006b":2}"#[member(r#"{"k":1,"\u006b":2}"#, "k").unwrap()], "2");
    }

    #[test]
    fn what_is_no_json_gives_no_place() {
        for text in ["", "[1]", "{", r#"{"a"#, r#"{"a":"#, r#"{"a":[1"#, r#"{"a":,}"#, r#"{"a":"\"#, "{]}"] {
            assert_eq!(member(text, "b"), None, "{text}");
        }
        assert_eq!(elements("[1,", 0..3), None);
    }
}
