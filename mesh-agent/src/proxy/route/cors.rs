//! Cross-Origin Resource Sharing: what a browser may read.

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method};

use super::matching::value;
use crate::model::http::{Cors, Preflight};

/// What becomes of a request by its origin.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgement {
    /// It goes on, and so does its answer: no other origin asks, or one that gets no permission. The browser refuses then.
    Pass,
    /// It goes on; `allow` is to be called with its answer's headers.
    Allowed(HeaderValue),
    /// It asks only for permission: it is answered with 200 and these headers.
    Answer(HeaderMap),
}

pub fn judge(cors: &Cors, method: &Method, headers: &HeaderMap) -> Judgement {
    let Some(origin) = headers.get(ORIGIN) else { return Judgement::Pass };
    let is_allowed = origin.to_str().is_ok_and(|text| cors.origins.iter().any(|wanted| value(wanted, text)));
    let is_preflight = *method == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    match (is_preflight, is_allowed) {
        (true, true) => {
            let mut answer = HeaderMap::new();
            permit(cors, origin, &mut answer);
            for (name, allowed, asked) in [
                (ACCESS_CONTROL_ALLOW_METHODS, &cors.methods, ACCESS_CONTROL_REQUEST_METHOD),
                (ACCESS_CONTROL_ALLOW_HEADERS, &cors.headers, ACCESS_CONTROL_REQUEST_HEADERS),
            ] {
                let Some(allowed) = allowed else { continue };
                // With credentials a browser takes `*` for a name.
                let said = if cors.credentials && allowed.0 == "*" { headers.get(asked) } else { Some(&allowed.0) };
                if let Some(said) = said {
                    answer.insert(name, said.clone());
                }
            }
            if let Some(max_age) = &cors.max_age {
                answer.insert(ACCESS_CONTROL_MAX_AGE, max_age.0.clone());
            }
            Judgement::Answer(answer)
        }
        (true, false) if cors.unmatched == Preflight::Answer => Judgement::Answer(HeaderMap::new()),
        (false, true) => Judgement::Allowed(origin.clone()),
        (_, false) => Judgement::Pass,
    }
}

/// Writes the permission into the answer to a request of an allowed origin, in place of the server's own.
pub fn allow(cors: &Cors, origin: &HeaderValue, answer: &mut HeaderMap) {
    permit(cors, origin, answer);
    if let Some(expose) = &cors.expose {
        answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.0.clone());
    }
}

fn permit(cors: &Cors, origin: &HeaderValue, answer: &mut HeaderMap) {
    answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    // What a cache keeps for one origin is not for another.
    answer.append(VARY, HeaderValue::from_static("Origin"));
    match cors.credentials {
        true => drop(answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"))),
        false => drop(answer.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::http::{Pattern, Value, ValueMatch};

    fn cors() -> Cors {
        Cors {
            origins: vec![
                ValueMatch::Exact("https://shop.example".into()),
                ValueMatch::Pattern(Pattern::new(r"https://[a-z]+\.bank\.example").unwrap()),
            ],
            methods: Value::new("GET, POST"),
            headers: Value::new("x-token"),
            max_age: Value::new("600"),
            expose: Value::new("x-total"),
            credentials: true,
            unmatched: Preflight::Forward,
        }
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (n.parse().unwrap(), HeaderValue::from_static(v))).collect()
    }

    const ASKS: (&str, &str) = ("access-control-request-method", "POST");

    #[test]
    fn a_preflight_of_an_allowed_origin_is_answered() {
        let Judgement::Answer(answer) =
            judge(&cors(), &Method::OPTIONS, &headers(&[("origin", "https://a.bank.example"), ASKS]))
        else {
            panic!("not answered")
        };
        let expected = headers(&[
            ("access-control-allow-origin", "https://a.bank.example"),
            ("vary", "Origin"),
            ("access-control-allow-credentials", "true"),
            ("access-control-allow-methods", "GET, POST"),
            ("access-control-allow-headers", "x-token"),
            ("access-control-max-age", "600"),
        ]);
        assert_eq!(answer, expected);
    }

    #[test]
    fn a_star_beside_credentials_is_what_was_asked_for() {
        let star = |credentials| Cors { methods: Value::new("*"), headers: Value::new("*"), credentials, ..cors() };
        let origin = ("origin", "https://shop.example");
        let answer = |cors: Cors, asked: &[(&'static str, &'static str)]| {
            let Judgement::Answer(answer) = judge(&cors, &Method::OPTIONS, &headers(asked)) else {
                panic!("not answered")
            };
            let text = |name| answer.get(name).map(|v| v.to_str().unwrap().to_owned());
            (text("access-control-allow-methods"), text("access-control-allow-headers"))
        };
        let asked = [origin, ASKS, ("access-control-request-headers", "x-a, x-b")];
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(answer(star(true), &asked), (some("POST"), some("x-a, x-b")));
        assert_eq!(answer(star(true), &[origin, ASKS]), (some("POST"), None));
        assert_eq!(answer(star(false), &asked), (some("*"), some("*")));
    }

    #[test]
    fn others_get_no_permission() {
        for origin in ["https://shop.example.evil", "http://shop.example", "null", "https://a.b.bank.example"] {
            let asked = headers(&[("origin", origin), ASKS]);
            assert_eq!(judge(&cors(), &Method::OPTIONS, &asked), Judgement::Pass, "{origin}");
            let here = Cors { unmatched: Preflight::Answer, ..cors() };
            assert_eq!(judge(&here, &Method::OPTIONS, &asked), Judgement::Answer(HeaderMap::new()), "{origin}");
            assert_eq!(judge(&cors(), &Method::GET, &headers(&[("origin", origin)])), Judgement::Pass, "{origin}");
        }
        assert_eq!(judge(&cors(), &Method::OPTIONS, &headers(&[ASKS])), Judgement::Pass);
    }

    #[test]
    fn the_answer_says_what_the_rule_says_and_not_the_server() {
        let Judgement::Allowed(origin) = judge(&cors(), &Method::GET, &headers(&[("origin", "https://shop.example")]))
        else {
            panic!("not allowed")
        };
        let mut answer = headers(&[
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("vary", "Accept"),
        ]);
        allow(&Cors { credentials: false, ..cors() }, &origin, &mut answer);
        assert_eq!(answer.get_all("access-control-allow-origin").iter().collect::<Vec<_>>(), ["https://shop.example"]);
        assert_eq!(answer.get("access-control-allow-credentials"), None);
        assert_eq!(answer.get("access-control-expose-headers").unwrap(), "x-total");
        assert_eq!(answer.get_all("vary").iter().collect::<Vec<_>>(), ["Accept", "Origin"]);
        // OPTIONS without the question is a request like any other.
        let options = judge(&cors(), &Method::OPTIONS, &headers(&[("origin", "https://shop.example")]));
        assert!(matches!(options, Judgement::Allowed(_)));
    }
}
