//! Payloads as JSON.

use std::collections::BTreeMap;

use pushpop_pg::{ErrorKind, NewMessage};

use crate::world::{World, pop};

#[test]
fn smoke() {
    let world = World::new();
    let queue = world.queue();
    queue.push("t", NewMessage::json(&("birds", 7, Some(1.5), ())).unwrap()).unwrap();
    let lease = pop(&queue, "t");
    assert_eq!(lease.payload(), br#"["birds",7,1.5,null]"#);
    let read: (String, u8, Option<f64>, ()) = lease.json().unwrap();
    assert_eq!(read, ("birds".to_owned(), 7, Some(1.5), ()));
}

#[test]
fn a_payload_that_is_other_json_is_invalid_and_not_quoted() {
    let world = World::new();
    let queue = world.queue();
    for payload in [r#"{"secret": "hunter2"}"#, "hunter2", r#""hunter2""#, ""] {
        queue.push("t", payload).unwrap();
        let lease = pop(&queue, "t");
        let error = lease.json::<Vec<u32>>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        lease.discard().unwrap();
    }
}

#[test]
fn a_value_that_is_no_json_is_invalid() {
    let keys_that_are_no_text = BTreeMap::from([((1, 2), 3)]);
    let error = NewMessage::json(&keys_that_are_no_text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(std::error::Error::source(&error).is_some());
}
