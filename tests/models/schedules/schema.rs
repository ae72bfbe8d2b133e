//! In place of `schema.rs`: the server of the world knows calls by their names.

pub(crate) struct Schema;

impl Schema {
    pub(crate) fn localize(&self, _: &str) -> String {
        String::new()
    }

    pub(crate) fn identifier(&self) -> &'static str {
        "pushpop"
    }
}
