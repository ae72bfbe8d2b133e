//! The seam for instruments.

use std::time::Duration;

use uuid::Uuid;

/// Is told what a [`Queue`](crate::Queue) does: for metrics, traces, tests.
///
/// Every method has an empty default. They are called on threads of the queue, once callers have their answers, or of a
/// worker, and while no lock is held: they may call the queue. They should return soon: up to 16 threads of the queue may
/// be in them while others take their places; beyond that, calls wait. A panic in one is caught and logged.
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use pushpop_pg::{Observer, Pushed};
///
/// #[derive(Default)]
/// struct Counter(AtomicUsize);
///
/// impl Observer for Counter {
///     fn pushed(&self, event: &Pushed<'_>) {
///         self.0.fetch_add(event.count(), Ordering::Relaxed);
///     }
/// }
/// ```
pub trait Observer: Send + Sync + 'static {
    /// Messages were pushed.
    fn pushed(&self, event: &Pushed<'_>) {
        let _ = event;
    }

    /// Messages were popped.
    fn popped(&self, event: &Popped<'_>) {
        let _ = event;
    }

    /// A message was settled, or its lease extended.
    fn settled(&self, event: &Settled<'_>) {
        let _ = event;
    }

    /// A statement was carried out for one or more callers. Told for each of the topics that shared it.
    fn flight(&self, event: &Flight<'_>) {
        let _ = event;
    }

    /// A connection was opened in place of one that broke.
    fn reconnected(&self) {}

    /// A settle was refused, because the lease was lost.
    fn lease_lost(&self, event: &LeaseLost<'_>) {
        let _ = event;
    }

    /// Messages were popped for callers that were gone by then; they are released.
    fn abandoned(&self, event: &Abandoned<'_>) {
        let _ = event;
    }

    /// A worker has handled a message, whatever came of it.
    fn handled(&self, event: &Handled<'_>) {
        let _ = event;
    }

    /// A worker's handler still runs after more time than its message's lease had at first. Told again
    /// each time its age has doubled.
    fn stuck(&self, event: &Stuck<'_>) {
        let _ = event;
    }
}

/// The observer that nobody asked for.
pub(crate) struct Silent;

impl Observer for Silent {}

/// What happened on a flight.
pub(crate) enum Event<'a> {
    Pushed(Pushed<'a>),
    /// The topic is that of the messages: a flight may be for whichever of many has some.
    Popped {
        topic: String,
        count: usize,
    },
    Settled(Settled<'a>),
    LeaseLost(LeaseLost<'a>),
    Abandoned {
        topic: String,
        count: usize,
        closed: bool,
    },
    Flight(Flight<'a>),
    Reconnected,
}

impl Event<'_> {
    pub(crate) fn tell(&self, observer: &dyn Observer) {
        match self {
            Event::Pushed(event) => observer.pushed(event),
            Event::Popped { topic, count } => observer.popped(&Popped { topic, count: *count }),
            Event::Settled(event) => observer.settled(event),
            Event::LeaseLost(event) => observer.lease_lost(event),
            Event::Abandoned { topic, count, .. } => observer.abandoned(&Abandoned { topic, count: *count }),
            Event::Flight(event) => observer.flight(event),
            Event::Reconnected => observer.reconnected(),
        }
    }
}

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name<'a> {
            pub(crate) topic: &'a str,
            $(pub(crate) $field: $type,)*
        }

        impl<'a> $name<'a> {
            /// The topic.
            pub fn topic(&self) -> &'a str {
                self.topic
            }

            $($(#[$field_doc])*
            pub fn $field(&self) -> $type {
                self.$field
            })*
        }
    )*};
}

events! {
    /// Messages were pushed by one call.
    Pushed {
        /// How many were given to the call.
        count: usize,
        /// How many of them changed nothing, because their id was stored already.
        duplicates: usize,
    }

    /// Messages were popped by one call.
    Popped {
        /// How many.
        count: usize,
    }

    /// A message was settled.
    Settled {
        /// Its id.
        id: Uuid,
        /// `complete`, `discard`, `defer`, `release`, `fail` or `extend`.
        outcome: &'static str,
    }

    /// A statement was carried out.
    Flight {
        /// `push`, `pop`, `settle`, or `turn`: settles and pops of a worker.
        kind: &'static str,
        /// How many callers shared it.
        callers: usize,
        /// How many messages it carried.
        rows: usize,
        /// How long it took, its commit included.
        duration: Duration,
        /// Whether it succeeded.
        succeeded: bool,
    }

    /// A lease was lost.
    LeaseLost {
        /// The id of its message.
        id: Uuid,
        /// What was attempted: `complete`, `discard`, `defer`, `release`, `fail` or `extend`.
        outcome: &'static str,
    }

    /// Messages were popped for nobody.
    Abandoned {
        /// How many.
        count: usize,
    }

    /// A message was handled by a worker.
    Handled {
        /// Its id.
        id: Uuid,
        /// What the handler said, `complete`, `discard`, `defer`, `settled` (it had settled the message
        /// itself) or `fail`; or how it ended otherwise: `panic`; or, decided before it returned, `timeout` (the limit
        /// of the worker) or `released` (given back at the end of the grace period).
        outcome: &'static str,
        /// The number of the attempt.
        attempt: u32,
        /// How long the handler ran.
        duration: Duration,
    }

    /// A worker's handler does not come to an end.
    Stuck {
        /// The id of its message.
        id: Uuid,
        /// How long it has been running.
        age: Duration,
    }
}
