//! The questions about objects (QEMU, qapi/qom.json). Only the parts of a reply
//! that are used are kept in memory. A generic JSON value of a hostile peer's
//! reply could need a hundred times the memory of its text.

use std::fmt;

use qapi::qmp::QmpCommand;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// `qom-get`: a property of an object.
#[derive(Debug, serde::Serialize)]
pub struct QomGet {
    pub path: String,
    pub property: String,
}

/// `qom-list`: the properties of an object, its children among them.
#[derive(Debug, serde::Serialize)]
pub struct QomList {
    pub path: String,
}

/// The value of a property, if it is of a kind that this tool uses.
#[derive(Debug, PartialEq, Eq)]
pub enum Property {
    Text(String),
    Number(u64),
    Truth(bool),
    Other,
}

/// A property in a list.
#[derive(Debug, serde::Deserialize)]
pub struct Listed {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
}

impl qapi::Command for QomGet {
    type Ok = Property;
    const NAME: &'static str = "qom-get";
    const ALLOW_OOB: bool = false;
}

impl QmpCommand for QomGet {}

impl qapi::Command for QomList {
    type Ok = Vec<Listed>;
    const NAME: &'static str = "qom-list";
    const ALLOW_OOB: bool = false;
}

impl QmpCommand for QomList {}

impl Property {
    /// The number, if it is one.
    pub fn number(&self) -> Option<u64> {
        match self {
            Property::Number(number) => Some(*number),
            Property::Text(_) | Property::Truth(_) | Property::Other => None,
        }
    }

    /// The text, if it is one.
    pub fn text(self) -> Option<String> {
        match self {
            Property::Text(text) => Some(text),
            Property::Number(_) | Property::Truth(_) | Property::Other => None,
        }
    }

    /// The truth value, if it is one.
    pub fn truth(self) -> Option<bool> {
        match self {
            Property::Truth(truth) => Some(truth),
            Property::Text(_) | Property::Number(_) | Property::Other => None,
        }
    }
}

impl Listed {
    /// The type of a child, `usb-tablet` in `child<usb-tablet>`.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

impl<'de> Deserialize<'de> for Property {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyProperty)
    }
}

struct AnyProperty;

impl<'de> Visitor<'de> for AnyProperty {
    type Value = Property;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E>(self, text: &str) -> Result<Property, E> {
        Ok(Property::Text(text.to_owned()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Property, E> {
        Ok(Property::Number(number))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Property, E> {
        Ok(Property::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Property, E> {
        Ok(Property::Other)
    }

    fn visit_bool<E>(self, truth: bool) -> Result<Property, E> {
        Ok(Property::Truth(truth))
    }

    fn visit_unit<E>(self) -> Result<Property, E> {
        Ok(Property::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Property, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Property::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Property, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Property::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_property_is_a_text_a_number_or_nothing_of_interest() {
        let read = |json: &str| serde_json::from_str::<Property>(json).unwrap();
        assert_eq!(read("\"a\\n\""), Property::Text("a\n".into()));
        assert_eq!(read("7"), Property::Number(7));
        assert_eq!(read("true"), Property::Truth(true));
        for json in ["-7", "1.5", "null", "[[1], {}]", "{\"a\": [{\"b\": null}]}"] {
            assert_eq!(read(json), Property::Other, "{json}");
        }
    }

    #[test]
    fn a_child_is_known_by_its_type() {
        let json = r#"[{"name": "a", "type": "child<usb-tablet>", "default-value": [1]},
                       {"name": "b", "type": "string", "description": "x"}]"#;
        let listed: Vec<Listed> = serde_json::from_str(json).unwrap();
        let types: Vec<Option<&str>> = listed.iter().map(Listed::child_type).collect();
        assert_eq!(types, [Some("usb-tablet"), None]);
    }
}
