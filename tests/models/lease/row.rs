//! A row as READ COMMITTED shows and locks it.

/// The number of a session of the server; it has one transaction at a time.
pub(crate) type Session = u8;

/// A row that may not be there: what is committed, and what the transaction that has it locked has made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Row<T> {
    now: Option<T>,
    held: Option<(Session, Option<T>)>,
}

impl<T: Copy> Row<T> {
    /// Committed.
    pub(crate) fn of(value: T) -> Self {
        Row { now: Some(value), held: None }
    }

    /// Not there.
    pub(crate) fn none() -> Self {
        Row { now: None, held: None }
    }

    /// What is committed.
    pub(crate) fn committed(&self) -> Option<T> {
        self.now
    }

    /// What a statement of the session sees: its own changes, else what is committed.
    pub(crate) fn seen(&self, by: Session) -> Option<T> {
        match self.held {
            Some((session, value)) if session == by => value,
            _ => self.now,
        }
    }

    /// Whether no other session has it locked.
    pub(crate) fn is_free(&self, to: Session) -> bool {
        self.held.is_none_or(|(session, _)| session == to)
    }

    /// Locks it; only when it is free.
    pub(crate) fn lock(&mut self, by: Session) {
        assert!(self.is_free(by), "a statement waits for a row that is locked");
        self.held.get_or_insert((by, self.now));
    }

    /// Locks and writes it, inserts it, or deletes it with `None`.
    pub(crate) fn write(&mut self, by: Session, value: Option<T>) {
        self.lock(by);
        self.held = Some((by, value));
    }

    /// The session's transaction ends.
    pub(crate) fn end(&mut self, by: Session, commits: bool) {
        if let Some((session, value)) = self.held
            && session == by
        {
            if commits {
                self.now = value;
            }
            self.held = None;
        }
    }
}
