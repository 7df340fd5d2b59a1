//! Settings as written: names and text, and who wrote them. A flag beats a variable, which beats the file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::{ConfigError, Kind, SETTINGS, Setting};

/// In the state directory: the settings of ConfigMap `nodemesh` that were in force last.
pub const LAST_GOOD_SETTINGS: &str = "last-good-settings.yaml";

/// The weaker first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    File,
    Variable,
    Flag,
}

/// All that file, variables and flags say, not yet understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    values: BTreeMap<&'static str, (Origin, Vec<String>)>,
    /// The settings file, as the user named it.
    file: String,
}

impl Written {
    /// Takes the values of `setting`, unless a stronger origin has spoken.
    pub fn set(&mut self, setting: &'static Setting, origin: Origin, values: Vec<String>) {
        let entry = self.values.entry(setting.name).or_insert_with(|| (origin, values.clone()));
        if origin >= entry.0 {
            *entry = (origin, values);
        }
    }

    /// Reads a settings file. An unknown key is an error, and so is one that stands twice.
    pub fn read(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| ConfigError(format!("cannot read the settings file {}: {}", path.display(), io_reason(&e))))?;
        self.parse(&path.display().to_string(), &text)
    }

    /// Reads the settings file of a node, over which flags and variables lie already. In Kubernetes it is of a ConfigMap; where
    /// that is gone, what was last good on this node counts.
    pub fn read_of_node(&mut self, path: &Path) -> Result<(), ConfigError> {
        if path.exists() || self.get("source") != Some("kubernetes") {
            return self.read(path);
        }
        let state = Setting::named("state-dir").map(|setting| setting.default).unwrap_or_default();
        let kept = Path::new(self.get("state-dir").unwrap_or(state)).join(LAST_GOOD_SETTINGS);
        if kept.exists() {
            return self.read(&kept);
        }
        Err(ConfigError(format!(
            "there is no settings file {}, so ConfigMap nodemesh is gone, and no last good settings are on this node: put it \
             back with `meshctl upgrade`",
            path.display()
        )))
    }

    /// As `read`, of a text that was read already.
    pub fn parse(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        self.file = file.to_owned();
        let Entries(entries) = match text.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with('#')) {
            true => Entries(Vec::new()),
            false => serde_saphyr::from_str(text).map_err(|e| not_yaml(file, &e))?,
        };
        for (key, line, values) in entries {
            let Some(setting) = SETTINGS.iter().find(|s| s.key() == key) else {
                return Err(unknown_key(file, &key, line));
            };
            if values.len() != 1 && setting.kind != Kind::Many {
                return Err(ConfigError(format!("{file}: line {line}: `{key}` takes one value and not a list")));
            }
            self.set(setting, Origin::File, values);
        }
        Ok(())
    }

    /// Names of settings that stand otherwise in `other`.
    pub fn differing(&self, other: &Self) -> impl Iterator<Item = &'static str> {
        SETTINGS.iter().map(|s| s.name).filter(move |name| self.all(name) != other.all(name))
    }

    pub(super) fn get(&self, name: &'static str) -> Option<&str> {
        debug_assert!(Setting::named(name).is_some(), "`{name}` is in the table");
        self.values.get(name).and_then(|(_, values)| values.first()).map(String::as_str)
    }

    pub(super) fn all(&self, name: &'static str) -> &[String] {
        self.values.get(name).map(|(_, values)| values.as_slice()).unwrap_or_default()
    }

    /// How the user wrote it: `--node-name`, `NODEMESH_NODE_NAME` or `nodeName in /etc/nodemesh.yaml`.
    pub(super) fn place(&self, name: &'static str) -> String {
        let setting = Setting::named(name).expect("only names of the table are asked for");
        match self.values.get(name).map(|(origin, _)| *origin) {
            Some(Origin::File) => format!("{} in {}", setting.key(), self.file),
            Some(Origin::Variable) => setting.variable(),
            Some(Origin::Flag) | None => format!("--{name}"),
        }
    }
}

/// What the operating system says, without its number, to stand at the end of a sentence.
pub(super) fn io_reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map(|c| c.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

fn unknown_key(file: &str, key: &str, line: u64) -> ConfigError {
    let near = SETTINGS.iter().map(Setting::key).find(|k| {
        let plain = |s: &str| s.to_lowercase().replace(['-', '_'], "");
        plain(k) == plain(key)
    });
    ConfigError(match near {
        Some(near) => format!("{file}: line {line}: unknown setting `{key}`; write `{near}`"),
        None => format!("{file}: line {line}: unknown setting `{key}`; `mesh-agent node --help` lists them all"),
    })
}

fn not_yaml(file: &str, error: &serde_saphyr::Error) -> ConfigError {
    // Without its location in words, which stands in front here, and without the picture of the source.
    let text = error.without_snippet().to_string();
    let text = text.lines().next().unwrap_or_default();
    let text = text.split(" at line ").next().unwrap_or(text);
    let line = error.location().map_or(1, |l| l.line());
    ConfigError(format!("{file}: line {line}: {text}"))
}

/// The top-level keys of the file with their lines, in order.
struct Entries(Vec<(String, u64, Vec<String>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("settings, one `name: value` a line")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let Texts(values) = map.next_value()?;
                    entries.push((key.value, key.referenced.line(), values));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// A scalar or a list of scalars, as text.
struct Texts(Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalars;
        impl<'de> Visitor<'de> for Scalars {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, a boolean, or a list of them")
            }

            fn visit_str<E>(self, v: &str) -> Result<Texts, E> {
                Ok(Texts(vec![v.to_owned()]))
            }

            fn visit_bool<E>(self, v: bool) -> Result<Texts, E> {
                Ok(Texts(vec![v.to_string()]))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Texts, E> {
                Ok(Texts(vec![v.to_string()]))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Texts, E> {
                Ok(Texts(vec![v.to_string()]))
            }

            fn visit_f64<E>(self, v: f64) -> Result<Texts, E> {
                Ok(Texts(vec![v.to_string()]))
            }

            /// `key:` with nothing after it: an empty value, which the check then refuses by name.
            fn visit_unit<E>(self) -> Result<Texts, E> {
                Ok(Texts(vec![String::new()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Texts, A::Error> {
                let mut all = Vec::new();
                while let Some(Texts(values)) = seq.next_element()? {
                    all.extend(values);
                }
                Ok(Texts(all))
            }
        }
        deserializer.deserialize_any(Scalars)
    }
}
