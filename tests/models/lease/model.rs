//! Messages, runs, leases, and those who pop, extend and settle.
//!
//! A step is a statement, or the part of one between two rows that it may wait for; all sessions take their steps in any
//! order. The order of messages, payloads and the hints that make pops fast are left out, but for `reclaimed_to`, which
//! decides whether a lease that ended is found.

use stateright::{Model, Property};

use crate::row::{Row, Session};

/// How many messages there are. A slot of a lease is that of the message with its number.
pub(crate) const MESSAGES: usize = 2;

/// For so long a message is leased, by the clock of the model.
const LEASE: u8 = 1;

/// What is explored: who is there, and how much of each may happen.
#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    /// Consumers. Each has one call under way at a time.
    pub(crate) clients: u8,
    /// Sessions of the server: more than clients, if calls of theirs may go on when nobody waits for them.
    pub(crate) sessions: u8,
    /// Pops that take something.
    pub(crate) pops: u8,
    /// Until when the clock runs.
    pub(crate) clock: u8,
    /// What becomes of messages.
    pub(crate) verbs: &'static [Verb],
    /// Leases that are extended, and heartbeats.
    pub(crate) extensions: u8,
    /// Consumers that die with all they know.
    pub(crate) crashes: u8,
    /// Calls whose answer is lost while the server goes on with them.
    pub(crate) cuts: u8,
    /// Transactions that the server rolls back, or their client: a caller's own may end so.
    pub(crate) aborts: u8,
    /// Attempts of a message, after which it is dead.
    pub(crate) attempts: u8,
    /// How often upkeep moves the mark before which no lease is looked for.
    pub(crate) upkeeps: u8,
    /// What is wrong.
    pub(crate) bug: Option<Bug>,
}

/// Protocols that lose messages or hand them out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A settle does not compare the number of the delivery.
    UnfencedSettle,
    /// An extension does not lock the message: it ran at the same time as `reclaim`, and was told that it had succeeded
    /// while the message was handed on.
    ExtendWithoutLock,
    /// `reclaim` does not look for an extension again once it has the lock.
    NoSecondLook,
    /// The row of a lease goes with the first of its messages.
    SiblingsForgotten,
    /// Whether a lease has ended is said by the clock of whoever asks, which is fast.
    ClientClock,
    /// A settle that is repeated is counted again.
    OpenTwice,
    /// The mark of reclaimed leases is never begun anew.
    MarkForEver,
    /// A batch of settles writes to whatever its rows have become while it waited for them: servers before 15.15 and its
    /// like do so with `ctid = any (..)`. It was so in the code once, until the statement compared the number of the
    /// delivery too.
    CtidNotLookedAtAgain,
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    /// The message is done.
    Complete,
    /// It is free again, at once.
    Release,
    /// It is free again, or dead.
    Fail,
}

/// What is wrong with a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Broken {
    /// A settle took effect although its delivery was not the newest any more.
    Stale,
    /// A delivery ended twice.
    Twice,
    /// A caller was told that it had settled, and had not.
    FalseOk,
    /// A caller was told that its lease was lost, and had settled.
    FalseLost,
    /// A message was handed out that was settled or dead.
    Ghost,
}

/// A row of `messages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Message {
    /// How its last delivery ended.
    pub(crate) state: Ended,
    /// Deliveries that are over.
    pub(crate) fence: u8,
    /// Attempts that are over.
    pub(crate) attempt: u8,
}

/// The state of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ended {
    Pushed,
    Released,
    Failed,
    Expired,
    Completed,
    Dead,
}

impl Message {
    fn is_live(self) -> bool {
        !matches!(self.state, Ended::Completed | Ended::Dead)
    }

    /// Whether it is out for this delivery, as far as its row tells.
    fn is_at(self, fence: u8) -> bool {
        self.is_live() && self.fence + 1 == fence
    }
}

/// A row of `leases` as a pop makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shared {
    /// The number of the delivery of each message in it; 0: not in it.
    pub(crate) fences: [u8; MESSAGES],
    /// How many are not settled yet, or more.
    pub(crate) open: u8,
    /// Its end.
    pub(crate) until: u8,
}

impl Shared {
    fn without(self, used: u8) -> Self {
        Shared { open: self.open.saturating_sub(used), ..self }
    }

    fn ending(self, until: u8) -> Self {
        Shared { until, ..self }
    }
}

/// What came of one pop: its row, and those of messages that were extended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lease {
    shared: Row<Shared>,
    own: [Row<u8>; MESSAGES],
    fences: [u8; MESSAGES],
}

/// A message in the hands of a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Token {
    pop: u8,
    message: u8,
    fence: u8,
    /// The deadline that it was told.
    until: u8,
    /// How it was settled, if that was tried.
    sent: Option<Verb>,
}

/// A set of small numbers.
type Set = u32;

fn first(set: Set) -> Option<usize> {
    (set != 0).then(|| set.trailing_zeros() as usize)
}

/// What a consumer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    /// Up to so many messages. `looks`: leases that ended are looked for first, not only if there is nothing.
    Pop { max: u8, looks: bool },
    /// For each message the pop and the number of the delivery. `tidy`: not in a caller's transaction.
    Settle { verb: Verb, tokens: [Option<(u8, u8)>; MESSAGES], tidy: bool },
    /// One lease; `beats`: waits for no row.
    Extend { pop: u8, message: u8, fence: u8, beats: bool },
}

/// Where a transaction stands: what its next step will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Take { looked: bool },
    Scan,
    Ended { rows: Set, gave: bool },
    Slots { rows: Set, gave: bool, row: u8 },
    Slot { rows: Set, gave: bool, row: u8, slots: Set, stuck: bool },
    Look { rows: Set, gave: bool, row: u8, slots: Set, stuck: bool, message: u8 },
    Target,
    Snapshot { target: Set },
    Write { target: Set, done: Set },
    Tidy { counts: Set, done: Set },
    Answer { done: Set },
    Prove,
    Lock,
    Move,
    Commit(Reply),
}

/// What the caller will be told once it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reply {
    Granted(Option<u8>),
    Settled { done: Set, ok: Set },
    Extended(Option<u8>),
    Busy,
}

/// A transaction under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Tx {
    /// Who waits for it.
    client: Option<u8>,
    call: Call,
    moment: u8,
    at: At,
}

/// All there is at one time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    clock: u8,
    /// Before it no lease is looked for.
    mark: u8,
    messages: [Row<Message>; MESSAGES],
    /// That of each message, with the deliveries that are over.
    runs: [Row<u8>; MESSAGES],
    leases: Vec<Lease>,
    sessions: Vec<Option<Tx>>,
    clients: Vec<Vec<Token>>,
    left: Left,
    /// The newest delivery of each message that was handed out.
    granted: [u8; MESSAGES],
    /// Deliveries of each that have ended.
    over: [Set; MESSAGES],
    broken: Option<Broken>,
}

/// What may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Left {
    extensions: u8,
    crashes: u8,
    cuts: u8,
    aborts: u8,
    upkeeps: u8,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The clock goes on.
    Tick,
    /// A consumer begins a call.
    Begin(u8, Call),
    /// A transaction takes its next step.
    Step(Session),
    /// The answer to a consumer is lost; the server goes on.
    Cut(u8),
    /// A consumer dies; the server goes on with what it had asked.
    Crash(u8),
    /// A transaction is rolled back.
    Abort(Session),
    /// Upkeep moves the mark of reclaimed leases.
    Upkeep,
    /// Upkeep begins that mark anew, as it does once a minute.
    Clear,
}

impl Protocol {
    /// One consumer that has to do everything by itself brings all of it to its end: what is under way ends, leases
    /// end, and what is left is popped and completed.
    fn drains(&self, state: &State) -> bool {
        let mut state = state.clone();
        while state.sessions.iter().any(Option::is_some) {
            let mut moved = false;
            for session in 0..self.sessions {
                while self.step(&mut state, session) {
                    moved = true;
                }
            }
            if !moved {
                return false; // They wait for each other.
            }
        }
        state.clients.iter_mut().for_each(Vec::clear);
        if self.bug != Some(Bug::MarkForEver) {
            state.mark = 0;
        }
        for _ in 0..8 {
            if state.messages.iter().all(|m| m.committed().is_some_and(|m| !m.is_live())) {
                return true;
            }
            state.clock += LEASE + 1;
            self.alone(&mut state, Call::Pop { max: 2, looks: false });
            let mut tokens = [None; MESSAGES];
            for token in std::mem::take(&mut state.clients[0]) {
                tokens[usize::from(token.message)] = Some((token.pop, token.fence));
            }
            if tokens.iter().any(Option::is_some) {
                self.alone(&mut state, Call::Settle { verb: Verb::Complete, tokens, tidy: true });
            }
        }
        false
    }

    fn alone(&self, state: &mut State, call: Call) {
        self.begin(state, 0, call);
        while state.sessions.iter().any(Option::is_some) {
            self.step(state, 0);
        }
    }

    fn begin(&self, state: &mut State, client: u8, call: Call) {
        let Some(session) = state.sessions.iter().position(Option::is_none) else { return };
        let fast = if self.bug == Some(Bug::ClientClock) && client > 0 { LEASE } else { 0 };
        let at = match call {
            Call::Pop { looks: true, .. } => At::Scan,
            Call::Pop { .. } => At::Take { looked: false },
            Call::Settle { .. } => At::Target,
            Call::Extend { .. } => At::Prove,
        };
        // Who settles does not rely on the lease any more, whatever the answer will be.
        if let Call::Settle { verb, tokens, .. } = call {
            for token in &mut state.clients[usize::from(client)] {
                if tokens[usize::from(token.message)] == Some((token.pop, token.fence)) {
                    token.sent = Some(verb);
                }
            }
        }
        let moment = state.clock + fast;
        state.sessions[session] = Some(Tx { client: Some(client), call, moment, at });
    }

    /// Takes the next step of a session, unless it waits for a row. Returns whether it did.
    fn step(&self, state: &mut State, session: Session) -> bool {
        let Some(tx) = state.sessions[usize::from(session)] else { return false };
        let next = match tx.at {
            At::Commit(reply) => {
                state.commit(session, tx, reply);
                return true;
            }
            At::Take { .. }
            | At::Scan
            | At::Ended { .. }
            | At::Slots { .. }
            | At::Slot { .. }
            | At::Look { .. } => Some(self.pop(state, session, tx)),
            At::Target | At::Snapshot { .. } | At::Write { .. } | At::Tidy { .. } | At::Answer { .. } => {
                self.settle(state, session, tx)
            }
            At::Prove | At::Lock | At::Move => self.extend(state, session, tx),
        };
        let Some(at) = next else { return false };
        state.sessions[usize::from(session)] = Some(Tx { at, ..tx });
        true
    }

    // pop.sql, and `reclaim` in upkeep.sql: neither waits for a row.

    fn pop(&self, state: &mut State, session: Session, tx: Tx) -> At {
        let Call::Pop { max, .. } = tx.call else { return At::Commit(Reply::Busy) };
        match tx.at {
            At::Take { looked } => match state.take_runs(session, max, tx.moment + LEASE) {
                Some(pop) => At::Commit(Reply::Granted(Some(pop))),
                None if looked => At::Commit(Reply::Granted(None)),
                None => At::Scan,
            },
            At::Scan => At::Ended { rows: state.ended(session, state.mark, tx.moment), gave: false },
            At::Ended { rows, gave } => match first(rows) {
                None => {
                    // One that looked first looks for runs in any case; one that had found none, if there are any now.
                    let Call::Pop { looks, .. } = tx.call else { return At::Commit(Reply::Busy) };
                    if gave || looks { At::Take { looked: true } } else { At::Commit(Reply::Granted(None)) }
                }
                Some(row) => {
                    let rest = rows & !(1 << row);
                    // `for update skip locked`, and the condition once more.
                    if state.lock_ended(session, row, tx.moment) {
                        At::Slots { rows: rest, gave, row: row as u8 }
                    } else {
                        At::Ended { rows: rest, gave }
                    }
                }
            },
            At::Slots { rows, gave, row } => {
                let slots = state.slots(session, row);
                At::Slot { rows, gave, row, slots, stuck: false }
            }
            At::Slot { rows, gave, row, slots, stuck } => match first(slots) {
                None => {
                    state.end_row(session, row, stuck.then_some(tx.moment + 1));
                    At::Ended { rows, gave }
                }
                Some(message) => {
                    let slots = slots & !(1 << message);
                    if state.messages[message].is_free(session) {
                        state.messages[message].lock(session);
                        At::Look { rows, gave, row, slots, stuck, message: message as u8 }
                    } else {
                        At::Slot { rows, gave, row, slots, stuck: true }
                    }
                }
            },
            At::Look { rows, gave, row, slots, stuck, message } => {
                let (pop, own) = place(row);
                let fence = state.leases[pop].fences[usize::from(message)];
                let extended = own.is_none()
                    && self.bug != Some(Bug::NoSecondLook)
                    && state.leases[pop].own[usize::from(message)].seen(session).is_some();
                let given = !extended && self.give_back(state, session, message, fence, Ended::Expired);
                let gave = gave || given;
                At::Slot { rows, gave, row, slots, stuck }
            }
            at => at,
        }
    }

    // settle.sql.

    fn settle(&self, state: &mut State, session: Session, tx: Tx) -> Option<At> {
        let Call::Settle { verb, tokens, tidy } = tx.call else { return None };
        let unfenced = self.bug == Some(Bug::UnfencedSettle);
        let all = (0..MESSAGES).filter_map(|message| Some((message, tokens[message]?)));
        let matches = |seen: Option<Message>, fence: u8| {
            seen.is_some_and(|seen| if unfenced { seen.is_live() } else { seen.is_at(fence) })
        };
        Some(match tx.at {
            At::Target => {
                let proved = all.filter(|(message, (pop, _))| state.proves(session, *pop, *message));
                // A batch looks at the messages in the statement that looks at the leases.
                let target = proved.filter(|(message, (_, fence))| {
                    verb != Verb::Complete || matches(state.messages[*message].seen(session), *fence)
                });
                At::Snapshot { target: target.map(|(message, _)| 1 << message).sum() }
            }
            // The statement that writes sees what is committed when it begins ..
            At::Snapshot { target } => {
                let seen = all.filter(|(message, (_, fence))| {
                    target & 1 << message != 0 && matches(state.messages[*message].seen(session), *fence)
                });
                At::Write { target: seen.map(|(message, _)| 1 << message).sum(), done: 0 }
            }
            // .. and looks again at what it had to wait for.
            At::Write { target, done } => {
                let Some(message) = first(target) else {
                    return Some(if tidy && self.bug != Some(Bug::OpenTwice) {
                        At::Tidy { counts: done, done }
                    } else {
                        At::Answer { done }
                    });
                };
                let (_, fence) = tokens[message]?;
                let row = &state.messages[message];
                if !row.is_free(session) {
                    return None;
                }
                let known = row.seen(session);
                let anything = self.bug == Some(Bug::CtidNotLookedAtAgain)
                    && verb == Verb::Complete
                    && known.is_some_and(Message::is_live);
                let mut done = done;
                if matches(known, fence) || anything {
                    done |= 1 << message;
                    match verb {
                        Verb::Complete => state.messages[message].write(
                            session,
                            known.map(|m| Message {
                                state: Ended::Completed,
                                fence: m.fence + 1,
                                attempt: m.attempt + 1,
                            }),
                        ),
                        Verb::Release => {
                            self.give_back(state, session, message as u8, fence, Ended::Released);
                        }
                        Verb::Fail => {
                            self.give_back(state, session, message as u8, fence, Ended::Failed);
                        }
                    }
                }
                At::Write { target: target & !(1 << message), done }
            }
            // For each row of leases how many of its deliveries have ended by this statement.
            At::Tidy { counts, done } => {
                let Some(message) = first(counts) else { return Some(At::Answer { done }) };
                let (pop, _) = tokens[message]?;
                let same: Set = (0..MESSAGES)
                    .filter(|other| counts & 1 << other != 0 && tokens[*other].is_some_and(|t| t.0 == pop))
                    .map(|other| 1 << other)
                    .sum();
                let row = &mut state.leases[usize::from(pop)].shared;
                if row.is_free(session)
                    && let Some(shared) = row.seen(session)
                {
                    let used = same.count_ones() as u8;
                    let last = shared.open <= used || self.bug == Some(Bug::SiblingsForgotten);
                    row.write(session, (!last).then(|| shared.without(used)));
                }
                At::Tidy { counts: counts & !same, done }
            }
            At::Answer { done } => {
                let before = all.filter(|(message, (_, fence))| {
                    state.messages[*message].seen(session).is_some_and(|m| {
                        m.fence == *fence
                            && matches!(
                                (verb, m.state),
                                (Verb::Complete, Ended::Completed)
                                    | (Verb::Release, Ended::Released)
                                    | (Verb::Fail, Ended::Failed | Ended::Dead)
                            )
                    })
                });
                let ok = done | before.map(|(message, _)| 1 << message).sum::<Set>();
                let reply = Reply::Settled { done, ok };
                if self.bug == Some(Bug::OpenTwice) && tidy && ok != 0 {
                    state.sessions[usize::from(session)] = Some(Tx { at: At::Commit(reply), ..tx });
                    self.count_again(state, session, &tokens, ok);
                }
                At::Commit(reply)
            }
            _ => return None,
        })
    }

    /// What is wrong with [`Bug::OpenTwice`].
    fn count_again(&self, state: &mut State, session: Session, tokens: &[Option<(u8, u8)>], ok: Set) {
        for (message, token) in tokens.iter().enumerate() {
            let Some((pop, _)) = token.filter(|_| ok & 1 << message != 0) else { continue };
            let row = &mut state.leases[usize::from(pop)].shared;
            if row.is_free(session)
                && let Some(shared) = row.seen(session)
            {
                row.write(session, (shared.open > 1).then(|| shared.without(1)));
            }
        }
    }

    /// Under the lock of the message.
    fn give_back(&self, state: &mut State, session: Session, message: u8, fence: u8, how: Ended) -> bool {
        let at = usize::from(message);
        let known = state.messages[at].seen(session);
        let unfenced = self.bug == Some(Bug::UnfencedSettle) && how != Ended::Expired;
        let Some(known) = known.filter(|m| if unfenced { m.is_live() } else { m.is_at(fence) }) else {
            return false;
        };
        let attempt = known.attempt + u8::from(how != Ended::Released);
        let dead = attempt >= self.attempts && how != Ended::Released;
        let next = Message { state: if dead { Ended::Dead } else { how }, fence: known.fence + 1, attempt };
        state.messages[at].write(session, Some(next));
        // With a fence the run of a message that is leased cannot be there.
        if !dead && (state.runs[at].seen(session).is_none() || !unfenced) {
            state.runs[at].write(session, Some(next.fence));
        }
        true
    }

    // extend_lease and heartbeat, in settle.sql.

    fn extend(&self, state: &mut State, session: Session, tx: Tx) -> Option<At> {
        let Call::Extend { pop, message, fence, beats } = tx.call else { return None };
        let at = usize::from(message);
        let is_at = |row: &Row<Message>| row.seen(session).is_some_and(|m| m.is_at(fence));
        Some(match tx.at {
            At::Prove if !state.proves(session, pop, at) => At::Commit(Reply::Extended(None)),
            At::Prove => At::Lock,
            At::Lock if !is_at(&state.messages[at]) => At::Commit(Reply::Extended(None)),
            At::Lock if self.bug == Some(Bug::ExtendWithoutLock) => At::Move,
            At::Lock if !state.messages[at].is_free(session) && beats => At::Commit(Reply::Busy),
            At::Lock if !state.messages[at].is_free(session) => return None,
            At::Lock => {
                state.messages[at].lock(session);
                At::Move
            }
            At::Move => {
                let lease = &mut state.leases[usize::from(pop)];
                let own = &mut lease.own[at];
                if !own.is_free(session) {
                    return beats.then_some(At::Commit(Reply::Busy));
                }
                let until =
                    lease.shared.seen(session).map_or(0, |shared| shared.until).max(tx.moment + LEASE);
                let until = own.seen(session).map_or(until, |earlier| earlier.max(until));
                own.write(session, Some(until));
                At::Commit(Reply::Extended(Some(until)))
            }
            _ => return None,
        })
    }
}

/// The pop and the message of a row of `leases`: of the shared row none.
fn place(row: u8) -> (usize, Option<usize>) {
    (usize::from(row) / (MESSAGES + 1), (usize::from(row) % (MESSAGES + 1)).checked_sub(1))
}

impl State {
    fn take_runs(&mut self, session: Session, max: u8, until: u8) -> Option<u8> {
        let mut fences = [0; MESSAGES];
        let mut open = 0;
        for (message, run) in self.runs.iter_mut().enumerate() {
            let Some(fence) = run.seen(session).filter(|_| run.is_free(session) && open < max) else {
                continue;
            };
            run.write(session, None);
            fences[message] = fence + 1;
            open += 1;
        }
        if open == 0 {
            return None;
        }
        let mut lease = Lease { shared: Row::none(), own: [Row::none(); MESSAGES], fences };
        lease.shared.write(session, Some(Shared { fences, open, until }));
        self.leases.push(lease);
        Some(self.leases.len() as u8 - 1)
    }

    /// Rows of leases that ended, as a statement sees them.
    fn ended(&self, session: Session, mark: u8, moment: u8) -> Set {
        let rows = 0..self.leases.len() * (MESSAGES + 1);
        let ended = rows
            .filter(|row| self.until(session, *row).is_some_and(|until| until >= mark && until <= moment));
        ended.map(|row| 1 << row).sum()
    }

    fn until(&self, session: Session, row: usize) -> Option<u8> {
        let (pop, own) = place(row as u8);
        match own {
            None => self.leases[pop].shared.seen(session).map(|shared| shared.until),
            Some(message) => self.leases[pop].own[message].seen(session),
        }
    }

    fn lock_ended(&mut self, session: Session, row: usize, moment: u8) -> bool {
        let ended = self.until(session, row).is_some_and(|until| until <= moment);
        let (pop, own) = place(row as u8);
        let lease = &mut self.leases[pop];
        let free = match own {
            None => lease.shared.is_free(session),
            Some(message) => lease.own[message].is_free(session),
        };
        if ended && free {
            match own {
                None => lease.shared.lock(session),
                Some(message) => lease.own[message].lock(session),
            }
        }
        ended && free
    }

    /// Messages of a row that are still out for it, and were not extended.
    fn slots(&self, session: Session, row: u8) -> Set {
        let (pop, own) = place(row);
        let lease = &self.leases[pop];
        let slots = (0..MESSAGES).filter(|message| {
            let here = own.map_or(lease.fences[*message] > 0, |own| own == *message);
            let extended = own.is_none() && lease.own[*message].seen(session).is_some();
            let fence = lease.fences[*message];
            here && !extended && self.messages[*message].seen(session).is_some_and(|m| m.is_at(fence))
        });
        slots.map(|message| 1 << message).sum()
    }

    /// Deletes a row of leases, or looks at it again later.
    fn end_row(&mut self, session: Session, row: u8, again: Option<u8>) {
        let (pop, own) = place(row);
        let lease = &mut self.leases[pop];
        match own {
            None => {
                let shared = lease.shared.seen(session);
                lease.shared.write(session, shared.zip(again).map(|(shared, until)| shared.ending(until)));
            }
            Some(message) => lease.own[message].write(session, again),
        }
    }

    /// Whether the row of leases of a token is there, its own or the shared one.
    fn proves(&self, session: Session, pop: u8, message: usize) -> bool {
        let lease = &self.leases[usize::from(pop)];
        lease.shared.seen(session).is_some() || lease.own[message].seen(session).is_some()
    }

    fn end(&mut self, session: Session, commits: bool) {
        self.messages.iter_mut().for_each(|row| row.end(session, commits));
        self.runs.iter_mut().for_each(|row| row.end(session, commits));
        for lease in &mut self.leases {
            lease.shared.end(session, commits);
            lease.own.iter_mut().for_each(|row| row.end(session, commits));
        }
        self.sessions[usize::from(session)] = None;
    }

    /// Commits, looks whether that was right, and tells the caller.
    fn commit(&mut self, session: Session, tx: Tx, reply: Reply) {
        let before = self.messages.map(|row| row.committed());
        self.end(session, true);
        for (message, before) in before.into_iter().enumerate() {
            let (Some(before), Some(after)) = (before, self.messages[message].committed()) else { continue };
            if before != after {
                // The delivery that has ended, in the eyes of who ended it.
                let fence = match tx.call {
                    Call::Settle { tokens, .. } => tokens[message].map_or(0, |(_, fence)| fence),
                    _ => after.fence,
                };
                if fence != self.granted[message] {
                    self.broken.get_or_insert(Broken::Stale);
                } else if self.over[message] & 1 << fence != 0 {
                    self.broken.get_or_insert(Broken::Twice);
                }
                self.over[message] |= 1 << fence;
            }
        }
        match (tx.call, reply) {
            (_, Reply::Granted(Some(pop))) => self.grant(tx, pop),
            (Call::Settle { verb, tokens, .. }, Reply::Settled { ok, done }) => {
                for (message, token) in tokens.into_iter().enumerate() {
                    let (Some((pop, fence)), Some(now)) = (token, self.messages[message].committed()) else {
                        continue;
                    };
                    let completed = now.state == Ended::Completed && now.fence == fence;
                    if verb == Verb::Complete && ok & 1 << message != 0 && !completed {
                        self.broken.get_or_insert(Broken::FalseOk);
                    } else if verb == Verb::Complete && (ok | done) & 1 << message == 0 && completed {
                        self.broken.get_or_insert(Broken::FalseLost);
                    }
                    if let Some(client) = tx.client {
                        self.clients[usize::from(client)]
                            .retain(|t| (usize::from(t.message), t.pop, t.fence) != (message, pop, fence));
                    }
                }
            }
            (Call::Extend { pop, message, fence, .. }, Reply::Extended(until)) => {
                let Some(client) = tx.client else { return };
                let tokens = &mut self.clients[usize::from(client)];
                let same = |t: &Token| (t.pop, t.message, t.fence) == (pop, message, fence);
                match until {
                    Some(until) => tokens.iter_mut().filter(|t| same(t)).for_each(|t| t.until = until),
                    None => tokens.retain(|t| !same(t)),
                }
            }
            _ => {}
        }
    }

    fn grant(&mut self, tx: Tx, pop: u8) {
        for (message, fence) in self.leases[usize::from(pop)].fences.into_iter().enumerate() {
            if fence == 0 {
                continue;
            }
            if !self.messages[message].committed().is_some_and(|m| m.is_at(fence)) {
                self.broken.get_or_insert(Broken::Ghost);
            }
            self.granted[message] = fence;
            if let Some(client) = tx.client {
                let until = tx.moment + LEASE;
                let token = Token { pop, message: message as u8, fence, until, sent: None };
                self.clients[usize::from(client)].push(token);
            }
        }
    }

    /// A message that is not over is in its run, or out by a lease of its next delivery.
    fn is_kept(&self, message: usize) -> bool {
        let Some(known) = self.messages[message].committed() else { return false };
        let waits = self.runs[message].committed();
        let next = known.fence + 1;
        let leased = self.leases.iter().any(|lease| {
            lease.fences[message] == next
                && (lease.shared.committed().is_some() || lease.own[message].committed().is_some())
        });
        if known.is_live() {
            waits == Some(known.fence) && !leased || waits.is_none() && leased
        } else {
            waits.is_none()
        }
    }

    /// How many rely on having a message, and may.
    fn holders(&self, message: usize) -> usize {
        let live = |token: &&Token| {
            usize::from(token.message) == message && token.sent.is_none() && token.until > self.clock
        };
        self.clients.iter().flatten().filter(live).count()
    }

    /// Whether each row of leases counts all that are not settled.
    fn counts(&self) -> bool {
        self.leases.iter().filter_map(|lease| lease.shared.committed()).all(|shared| {
            let out = (0..MESSAGES).filter(|message| {
                self.messages[*message].committed().is_some_and(|m| m.is_at(shared.fences[*message]))
            });
            usize::from(shared.open) >= out.count()
        })
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            clock: 0,
            mark: 0,
            messages: [Row::of(Message { state: Ended::Pushed, fence: 0, attempt: 0 }); MESSAGES],
            runs: [Row::of(0); MESSAGES],
            leases: Vec::new(),
            sessions: vec![None; usize::from(self.sessions)],
            clients: vec![Vec::new(); usize::from(self.clients)],
            left: Left {
                extensions: self.extensions,
                crashes: self.crashes,
                cuts: self.cuts,
                aborts: self.aborts,
                upkeeps: self.upkeeps,
            },
            granted: [0; MESSAGES],
            over: [0; MESSAGES],
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.clock < self.clock {
            actions.push(Action::Tick);
        }
        if state.left.upkeeps > 0 {
            actions.push(Action::Upkeep);
            if state.mark > 0 && self.bug != Some(Bug::MarkForEver) {
                actions.push(Action::Clear);
            }
        }
        let room = state.sessions.iter().any(Option::is_none);
        let popping =
            state.sessions.iter().flatten().filter(|tx| matches!(tx.call, Call::Pop { .. })).count();
        for client in 0..self.clients {
            let busy = state.sessions.iter().flatten().any(|tx| tx.client == Some(client));
            if busy && state.left.cuts > 0 {
                actions.push(Action::Cut(client));
            }
            let tokens = &state.clients[usize::from(client)];
            if state.left.crashes > 0 && (busy || !tokens.is_empty()) {
                actions.push(Action::Crash(client));
            }
            if busy || !room {
                continue;
            }
            if state.leases.len() + popping < usize::from(self.pops) {
                for (max, looks) in [(1, false), (2, false), (2, true)] {
                    actions.push(Action::Begin(client, Call::Pop { max, looks }));
                }
            }
            self.settles(tokens, |call| actions.push(Action::Begin(client, call)));
            for token in tokens.iter().filter(|t| t.sent.is_none() && state.left.extensions > 0) {
                let Token { pop, message, fence, .. } = *token;
                for beats in [false, true] {
                    actions.push(Action::Begin(client, Call::Extend { pop, message, fence, beats }));
                }
            }
        }
        for session in 0..self.sessions {
            if state.sessions[usize::from(session)].is_some() {
                actions.push(Action::Step(session));
                if state.left.aborts > 0 {
                    actions.push(Action::Abort(session));
                }
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => state.clock += 1,
            Action::Begin(client, call) => {
                state.left.extensions -= u8::from(matches!(call, Call::Extend { .. }));
                self.begin(&mut state, client, call);
            }
            Action::Step(session) => {
                if !self.step(&mut state, session) {
                    return None;
                }
            }
            Action::Cut(client) | Action::Crash(client) => {
                for tx in state.sessions.iter_mut().flatten().filter(|tx| tx.client == Some(client)) {
                    tx.client = None;
                }
                if action == Action::Cut(client) {
                    state.left.cuts -= 1;
                } else {
                    state.left.crashes -= 1;
                    state.clients[usize::from(client)].clear();
                }
            }
            Action::Abort(session) => {
                state.left.aborts -= 1;
                state.end(session, false);
            }
            Action::Upkeep => {
                state.left.upkeeps -= 1;
                let rows = 0..state.leases.len() * (MESSAGES + 1);
                // No session has this number: it sees what is committed.
                let next =
                    rows.filter_map(|row| state.until(self.sessions, row)).filter(|u| *u >= state.mark).min();
                state.mark = state.mark.max(next.unwrap_or(u8::MAX).min(state.clock.saturating_sub(1)));
            }
            Action::Clear => state.mark = 0,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no message is lost", |_, state: &State| {
                (0..MESSAGES).all(|m| state.is_kept(m))
            }),
            Property::always("one live lease", |_, state: &State| {
                (0..MESSAGES).all(|m| state.holders(m) <= 1)
            }),
            Property::always("a stale settle changes nothing", |_, state: &State| {
                state.broken != Some(Broken::Stale)
            }),
            Property::always("each delivery ends once", |_, state: &State| {
                state.broken != Some(Broken::Twice)
            }),
            Property::always("a lease counts all that is open", |_, state: &State| state.counts()),
            Property::always("the answer is true", |_, state: &State| {
                !matches!(state.broken, Some(Broken::FalseOk | Broken::FalseLost))
            }),
            Property::always("what is over is not handed out", |_, state: &State| {
                state.broken != Some(Broken::Ghost)
            }),
            Property::always("everything can come to an end", Protocol::drains),
        ]
    }
}

impl Protocol {
    /// The settles that a consumer with these tokens may ask for: of one, or of several at once.
    fn settles(&self, tokens: &[Token], mut ask: impl FnMut(Call)) {
        for verb in self.verbs {
            let fit = |token: &&Token| token.sent.is_none_or(|sent| sent == *verb);
            let mut all = [None; MESSAGES];
            for token in tokens.iter().filter(fit) {
                all[usize::from(token.message)] = Some((token.pop, token.fence));
                let mut one = [None; MESSAGES];
                one[usize::from(token.message)] = Some((token.pop, token.fence));
                for tidy in [true, false] {
                    ask(Call::Settle { verb: *verb, tokens: one, tidy });
                }
            }
            if *verb == Verb::Complete && all.iter().flatten().count() > 1 {
                ask(Call::Settle { verb: *verb, tokens: all, tidy: true });
            }
        }
    }
}
