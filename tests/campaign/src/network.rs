//! Cuts of the network.
//!
//! Half of the clients reach the server by one network, half by another. A cut hits one or both of them, in one of
//! five ways in turn: nothing passes until it ends; all is lost, or what is sent, or what is answered; connections are
//! reset. A connection that was open while something was lost, be it idle, is silent from then on, at both ends. Nothing is exempt: to the
//! queue a cut is an answer that does not come. The client written by hand is not there.

use std::time::{Duration, Instant};

use pushpop_pg::BoxError;
use pushpop_server::Network;

use crate::director::Director;
use crate::plan::Fault;

const WAYS: [Network; 5] =
    [Network::Silent, Network::Lost, Network::RequestsLost, Network::AnswersLost, Network::Reset];

/// How long one takes.
const SHORTEST: Duration = Duration::from_millis(300);
const LONGEST: Duration = Duration::from_secs(5);

impl Director<'_> {
    pub(crate) fn cut_network(&mut self) -> Result<(), BoxError> {
        self.cuts += 1;
        let way = WAYS[self.cuts % WAYS.len()];
        let which: &[usize] = [&[0][..], &[1], &[0, 1]][self.chance.place(3)];
        let time = SHORTEST + self.chance.up_to(LONGEST - SHORTEST);
        self.journal.line(format!("fault cut {which:?} {way:?} {time:?}"));
        self.stage.set_networks(which, way);
        self.rest(Instant::now() + time)?;
        self.stage.set_networks(which, Network::Works);
        self.mended(Fault::CutNetwork)
    }
}
