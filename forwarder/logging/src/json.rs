// SPDX-License-Identifier: Apache-2.0
//! A line of the log as a JSON object.

use std::io::{self, Write};

use env_logger::fmt::Formatter;
use log::{
    Record,
    kv::{Error, Key, Value, VisitSource, VisitValue},
};
use serde_json::Map;

pub fn write(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let time = out.timestamp_micros().to_string();
    writeln!(out, "{}", line(&time, record))
}

fn line(time: &str, record: &Record<'_>) -> serde_json::Value {
    let mut object = Map::new();
    // Names that a record gives do not take the place of these.
    let _ = record.key_values().visit(&mut Fields(&mut object));
    let fixed = [
        ("time", time.to_owned()),
        ("level", record.level().to_string()),
        ("target", record.target().to_owned()),
        ("message", record.args().to_string()),
    ];
    object.extend(fixed.map(|(name, value)| (name.to_owned(), value.into())));
    object.into()
}

struct Fields<'a>(&'a mut Map<String, serde_json::Value>);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let mut typed = Typed(serde_json::Value::Null);
        value.visit(&mut typed)?;
        self.0.insert(key.as_str().to_owned(), typed.0);
        Ok(())
    }
}

/// Numbers stay numbers; what JSON has no type for is text.
struct Typed(serde_json::Value);

impl<'v> VisitValue<'v> for Typed {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), Error> {
        self.0 = value.to_string().into();
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), Error> {
        self.0 = serde_json::Value::Null;
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), Error> {
        self.0 = value.into();
        Ok(())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), Error> {
        self.0 = value.into();
        Ok(())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), Error> {
        self.0 = value.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use log::{Level, Record};

    use super::line;

    #[test]
    fn a_line_has_its_message_and_what_it_is_about_by_name() {
        let fields = [("pause_us", log::kv::Value::from(1200_u64)), ("level", "mine".into())];
        let mut record = Record::builder();
        record.level(Level::Info).target("router").key_values(&fields);
        let line = line("now", &record.args(format_args!("swapped \"a\"\nb")).build());
        let expected =
            r#"{"level":"INFO","message":"swapped \"a\"\nb","pause_us":1200,"target":"router","time":"now"}"#;
        assert_eq!(line.to_string(), expected);
    }
}
