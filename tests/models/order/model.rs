//! Places in the order of a topic, the low watermark, late entries, and those who put, pop and look.
//!
//! A step is a statement; all sessions take theirs in any order, each under READ COMMITTED: it sees what is committed when it
//! begins, and what its own transaction has done. Times are those of a clock that ticks. Payloads, batches, attempts and
//! deadlines are left out: a lease may end at any time. What nobody else can see before the commit is one step with what comes
//! before: a transaction locks the table, reads its clock and puts its message at once.

use stateright::{Model, Property};

use crate::row::{Row, Session};

/// How many messages there are.
const MESSAGES: usize = 2;

/// A time in the past: before that of every transaction.
const PAST: u8 = 0;

/// What is explored: who is there, and how much of each may happen.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    /// Sessions of the server. Each has one transaction at a time.
    pub(crate) sessions: u8,
    /// Until when the clock runs.
    pub(crate) clock: u8,
    pub(crate) messages: u8,
    pub(crate) pops: u8,
    /// Pops may be committed later.
    pub(crate) slow_pops: bool,
    /// Looks that may move the watermark.
    pub(crate) looks: u8,
    /// Between the clock of a look and its list of those that run others may take steps.
    pub(crate) apart: bool,
    /// Looks at everything, for which the watermark is put back to the beginning.
    pub(crate) sweeps: u8,
    /// Transactions that are rolled back.
    pub(crate) aborts: u8,
    /// What is wrong.
    pub(crate) bug: Option<Bug>,
}

/// Protocols that hide messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A late entry is shared by all who put something to the same place: `on conflict do nothing`. It was so in the code.
    SharedEntry,
    /// What is given back has no late entry.
    NoEntry,
    /// The watermark may pass the time of a transaction that is not committed yet.
    NoHorizon,
    /// Of the transactions that ran at the last look it is enough that one has ended.
    OneHasEnded,
    /// The clock is read before the lock by which others see that this transaction runs.
    ClockBeforeLock,
    /// A look in a transaction whose snapshot is older than the list of those that run. It was so in the code.
    OldSnapshot,
    /// Late entries are read by one statement and deleted by another, which sees more of them.
    EntriesUnseen,
    /// Runs are read before the late entries are deleted.
    RunsReadFirst,
}

/// Where a message is, and how many deliveries of it are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Spot {
    ready_at: u8,
    fence: u8,
    leased: bool,
}

/// A row of `behind`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Entry {
    ready_at: u8,
    /// Whose transaction has inserted it, if that is not committed; and whose has deleted it.
    inserted: Option<Session>,
    deleted: Option<Session>,
}

/// The hints of the topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Topic {
    low: u8,
    sure_to: u8,
    checking_at: u8,
    checking_for: Set,
}

/// A set of small numbers.
type Set = u16;

/// What a transaction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    /// At once, or to a time in the past.
    Push {
        message: u8,
        past: bool,
    },
    /// A delivery that ends: its message goes to its old place, or to the end. A lease may end so, too.
    GiveBack {
        message: u8,
        fence: u8,
        later: bool,
    },
    /// `slow`: it is committed later.
    Pop {
        slow: bool,
    },
    Look,
    Sweep,
}

/// Where a transaction stands: what its next step will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Put,
    Take,
    Running,
    Late {
        known: Topic,
    },
    /// Of a bug: what was read is deleted.
    Forget {
        known: Topic,
        start: u8,
        alive: Option<u8>,
    },
    First {
        known: Topic,
        start: u8,
    },
    Move {
        known: Topic,
        alive: Option<u8>,
    },
    Reset,
    Commit,
    /// With the commit in the same step.
    End,
}

/// What a transaction with an old snapshot sees.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Seen {
    spots: [Option<Spot>; MESSAGES],
    entries: Vec<Entry>,
}

/// A transaction under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Tx {
    call: Call,
    /// By which the list of those that run knows it.
    number: u8,
    /// Whether that list has it.
    locked: bool,
    moment: u8,
    at: At,
    seen: Option<Seen>,
}

/// All there is at one time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    clock: u8,
    spots: [Row<Spot>; MESSAGES],
    entries: Vec<Entry>,
    topic: Row<Topic>,
    sessions: Vec<Option<Tx>>,
    left: Left,
}

/// What may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Left {
    pops: u8,
    looks: u8,
    sweeps: u8,
    aborts: u8,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The clock goes on.
    Tick,
    /// A session begins a transaction.
    Begin(Session, Call),
    /// A transaction takes its next step.
    Step(Session),
    /// A transaction is rolled back.
    Abort(Session),
}

impl Protocol {
    /// Locks the table, reads the clock and does all that nobody else can see before the commit; `false`: it has to wait.
    fn begin(&self, state: &mut State, session: Session, call: Call) -> bool {
        let known = state.topic.committed().map_or(0, |topic| topic.checking_for);
        let busy = state.sessions.iter().flatten().fold(known, |set, tx| set | tx.names());
        let early = matches!(call, Call::Push { .. } | Call::GiveBack { .. })
            && self.bug == Some(Bug::ClockBeforeLock);
        let old = self.bug == Some(Bug::OldSnapshot) && call == Call::Look;
        state.sessions[usize::from(session)] = Some(Tx {
            call,
            number: busy.trailing_ones() as u8,
            locked: !early,
            moment: state.clock,
            at: match call {
                Call::Push { .. } | Call::GiveBack { .. } => At::Put,
                Call::Pop { .. } => At::Take,
                Call::Look => At::Running,
                Call::Sweep => At::Reset,
            },
            seen: old.then(|| state.seen(session)),
        });
        if early || call == Call::Look && self.apart {
            return true;
        }
        let quick = matches!(call, Call::Pop { slow: false } | Call::Sweep);
        self.step(state, session) && (!quick || self.step(state, session))
    }

    /// The next step of a session; `false`: it has none, or waits.
    fn step(&self, state: &mut State, session: Session) -> bool {
        let Some(tx) = state.sessions[usize::from(session)].clone() else { return false };
        let Some(at) = self.next(state, session, &tx) else { return false };
        if at == At::End {
            state.end(session, true);
        } else {
            state.sessions[usize::from(session)] = Some(Tx { at, locked: true, ..tx });
        }
        true
    }

    fn next(&self, state: &mut State, session: Session, tx: &Tx) -> Option<At> {
        Some(match tx.at {
            At::Put => self.put(state, session, tx)?,
            At::Take => {
                state.take(session, tx.moment);
                At::Commit
            }
            // note_look, in order.sql: nobody waits for the row of the topic.
            At::Running if !state.topic.is_free(session) => return None,
            At::Running => {
                state.topic.lock(session);
                let mut known = state.topic.seen(session)?;
                let running = state.sessions.iter().flatten().filter(|tx| tx.locked);
                let running = running.fold(0, |set: Set, tx| set | 1 << tx.number);
                let still = known.checking_for & running;
                let one = self.bug == Some(Bug::OneHasEnded) && still != known.checking_for;
                if still == 0 || one {
                    known.sure_to = known.sure_to.max(known.checking_at);
                    known.checking_at = tx.moment;
                    known.checking_for = running;
                }
                At::Late { known }
            }
            At::Late { known } if self.bug == Some(Bug::RunsReadFirst) => {
                At::Forget { known, start: PAST, alive: state.first(session, known.low, None) }
            }
            At::Late { known } => {
                let late = state.entries(session, tx.seen.as_ref()).min();
                let start = known.low.min(late.unwrap_or(known.low));
                if self.bug == Some(Bug::EntriesUnseen) {
                    At::Forget { known, start, alive: None }
                } else {
                    state.delete_entries(session, tx.seen.as_ref());
                    At::First { known, start }
                }
            }
            At::Forget { known, start, alive } => {
                state.delete_entries(session, None);
                if self.bug == Some(Bug::RunsReadFirst) {
                    At::Move { known, alive }
                } else {
                    At::First { known, start }
                }
            }
            At::First { known, start } => {
                At::Move { known, alive: state.first(session, start, tx.seen.as_ref()) }
            }
            At::Move { known, alive } => {
                let most = if self.bug == Some(Bug::NoHorizon) { tx.moment } else { known.sure_to };
                let low = alive.map_or(most, |alive| alive.min(most));
                state.topic.write(session, Some(Topic { low, ..known }));
                At::End
            }
            // begin_sweep, and upkeep once a minute.
            At::Reset if !state.topic.is_free(session) => return None,
            At::Reset => {
                let known = state.topic.seen(session)?;
                state.topic.write(session, Some(Topic { low: PAST, ..known }));
                At::Commit
            }
            At::Commit | At::End => At::End,
        })
    }

    /// enqueue, in order.sql, and the message that is put.
    fn put(&self, state: &mut State, session: Session, tx: &Tx) -> Option<At> {
        let (message, spot) = match tx.call {
            Call::Push { message, past } => {
                let ready_at = if past { PAST } else { tx.moment };
                (usize::from(message), Spot { ready_at, fence: 0, leased: false })
            }
            Call::GiveBack { message, fence, later } => {
                let message = usize::from(message);
                if !state.spots[message].is_free(session) {
                    return None;
                }
                // Somebody else may have ended this delivery meanwhile.
                let spot =
                    state.spots[message].seen(session).filter(|spot| spot.leased && spot.fence == fence);
                let Some(spot) = spot else { return Some(At::Commit) };
                let ready_at = if later { tx.moment } else { spot.ready_at };
                (message, Spot { ready_at, fence: fence + 1, leased: false })
            }
            _ => return None,
        };
        if spot.ready_at < tx.moment && self.bug != Some(Bug::NoEntry) {
            let entry = Entry { ready_at: spot.ready_at, inserted: Some(session), deleted: None };
            if self.bug == Some(Bug::SharedEntry) {
                let mut same = state.entries.iter().filter(|entry| entry.ready_at == spot.ready_at);
                // Whoever inserts beside a row that comes or goes waits for that transaction.
                if same.clone().any(|e| e.inserted.is_some() || e.deleted.is_some()) {
                    return None;
                }
                if same.next().is_none() {
                    state.entries.push(entry);
                }
            } else {
                state.entries.push(entry);
            }
            state.entries.sort_unstable();
        }
        state.spots[message].write(session, Some(spot));
        Some(At::Commit)
    }
}

impl Tx {
    /// The numbers that it still needs to tell from others.
    fn names(&self) -> Set {
        let known = match self.at {
            At::Late { known }
            | At::Forget { known, .. }
            | At::First { known, .. }
            | At::Move { known, .. } => known.checking_for,
            _ => 0,
        };
        known | 1 << self.number
    }
}

impl State {
    fn seen(&self, session: Session) -> Seen {
        let entries = self.entries.iter().filter(|entry| entry.inserted.is_none()).cloned().collect();
        Seen { spots: self.spots.map(|row| row.seen(session)), entries }
    }

    /// The late entries that a statement sees.
    fn entries<'a>(&'a self, session: Session, seen: Option<&'a Seen>) -> impl Iterator<Item = u8> + 'a {
        let entries = seen.map_or(&self.entries, |seen| &seen.entries);
        let visible = entries.iter().filter(move |entry| {
            entry.inserted.is_none_or(|by| by == session) && entry.deleted != Some(session)
        });
        visible.map(|entry| entry.ready_at)
    }

    fn delete_entries(&mut self, session: Session, seen: Option<&Seen>) {
        for entry in &mut self.entries {
            let known = seen.is_none_or(|seen| seen.entries.iter().any(|e| e.ready_at == entry.ready_at));
            if entry.inserted.is_none_or(|by| by == session) && known {
                // The row of the topic is locked: nobody else deletes any.
                entry.deleted = Some(session);
            }
        }
    }

    /// The first run from a time on that a statement sees.
    fn first(&self, session: Session, start: u8, seen: Option<&Seen>) -> Option<u8> {
        let spots = seen.map_or_else(|| self.spots.map(|row| row.seen(session)), |seen| seen.spots);
        let waiting = spots.into_iter().flatten().filter(|spot| !spot.leased && spot.ready_at >= start);
        waiting.map(|spot| spot.ready_at).min()
    }

    /// Takes the first run from the mark on, or where there is none the first of all, if there are late entries.
    fn take(&mut self, session: Session, moment: u8) {
        let low = self.topic.seen(session).map_or(PAST, |topic| topic.low);
        let late = self.entries(session, None).next().is_some();
        let starts = [Some(low), late.then_some(PAST)];
        for start in starts.into_iter().flatten() {
            let free = (0..MESSAGES).filter(|message| self.spots[*message].is_free(session));
            let waiting = free.filter_map(|message| Some((self.spots[message].seen(session)?, message)));
            let ready = waiting.filter(|(s, _)| !s.leased && s.ready_at >= start && s.ready_at <= moment);
            if let Some((spot, message)) = ready.min_by_key(|(spot, message)| (spot.ready_at, *message)) {
                self.spots[message].write(session, Some(Spot { leased: true, ..spot }));
                return;
            }
        }
    }

    fn end(&mut self, session: Session, commits: bool) {
        self.spots.iter_mut().for_each(|row| row.end(session, commits));
        self.topic.end(session, commits);
        self.entries.retain(|entry| {
            let gone = if commits { entry.deleted } else { entry.inserted };
            gone != Some(session)
        });
        for entry in &mut self.entries {
            entry.inserted = entry.inserted.filter(|by| *by != session);
            entry.deleted = entry.deleted.filter(|by| *by != session);
        }
        self.entries.sort_unstable();
        self.sessions[usize::from(session)] = None;
    }

    /// Whether a pop would find each message that is committed and not leased.
    fn is_in_reach(&self) -> bool {
        let low = self.topic.committed().map_or(PAST, |topic| topic.low);
        let mut waiting = self.spots.iter().filter_map(|row| row.committed()).filter(|spot| !spot.leased);
        waiting.all(|spot| {
            let mut entries = self.entries.iter().filter(|entry| entry.inserted.is_none());
            spot.ready_at >= low || entries.any(|entry| entry.ready_at <= spot.ready_at)
        })
    }

    /// Whether every transaction with a clock before the horizon has ended, but for those that write nothing.
    fn is_sure(&self) -> bool {
        let sure_to = self.topic.committed().map_or(PAST, |topic| topic.sure_to);
        let puts = |tx: &&Tx| matches!(tx.call, Call::Push { .. } | Call::GiveBack { .. });
        self.sessions.iter().flatten().filter(puts).all(|tx| tx.moment >= sure_to)
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let topic = Topic { low: PAST, sure_to: PAST, checking_at: PAST, checking_for: 0 };
        vec![State {
            clock: 1,
            spots: [Row::none(); MESSAGES],
            entries: Vec::new(),
            topic: Row::of(topic),
            sessions: vec![None; usize::from(self.sessions)],
            left: Left { pops: self.pops, looks: self.looks, sweeps: self.sweeps, aborts: self.aborts },
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.clock < self.clock {
            actions.push(Action::Tick);
        }
        for session in 0..self.sessions {
            if state.sessions[usize::from(session)].is_some() {
                actions.push(Action::Step(session));
                if state.left.aborts > 0 {
                    actions.push(Action::Abort(session));
                }
            }
        }
        // Which of the free sessions begins makes no difference.
        let free = (0..self.sessions).find(|session| state.sessions[usize::from(*session)].is_none());
        let Some(session) = free else { return };
        let mut begin = |call| actions.push(Action::Begin(session, call));
        for message in 0..self.messages {
            let pushing = |tx: &Tx| matches!(tx.call, Call::Push { message: other, .. } if other == message);
            let row = &state.spots[usize::from(message)];
            match row.committed() {
                // The first before the second: they are alike.
                None if !state.sessions.iter().flatten().any(pushing)
                    && (message == 0
                        || state.spots[0].committed().is_some()
                        || state
                            .sessions
                            .iter()
                            .flatten()
                            .any(|tx| matches!(tx.call, Call::Push { .. }))) =>
                {
                    begin(Call::Push { message, past: false });
                    begin(Call::Push { message, past: true });
                }
                Some(Spot { leased: true, fence, .. }) => {
                    begin(Call::GiveBack { message, fence, later: false });
                    begin(Call::GiveBack { message, fence, later: true });
                }
                _ => {}
            }
        }
        if state.left.pops > 0 {
            begin(Call::Pop { slow: false });
            if self.slow_pops {
                begin(Call::Pop { slow: true });
            }
        }
        if state.left.looks > 0 {
            begin(Call::Look);
        }
        if state.left.sweeps > 0 {
            begin(Call::Sweep);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => state.clock += 1,
            Action::Begin(session, call) => {
                match call {
                    Call::Pop { .. } => state.left.pops -= 1,
                    Call::Look => state.left.looks -= 1,
                    Call::Sweep => state.left.sweeps -= 1,
                    Call::Push { .. } | Call::GiveBack { .. } => {}
                }
                if !self.begin(&mut state, session, call) {
                    return None;
                }
            }
            Action::Step(session) => {
                if !self.step(&mut state, session) {
                    return None;
                }
            }
            Action::Abort(session) => {
                state.left.aborts -= 1;
                state.end(session, false);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every message is in reach", |_, state: &State| state.is_in_reach()),
            Property::always("what comes before the horizon has ended", |_, state: &State| state.is_sure()),
        ]
    }
}
