//! All logs of a campaign, by message.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use pushpop_pg::BoxError;
use pushpop_pg::uuid::Uuid;

use crate::journal::{Entry, Outcome};
use crate::plan::ORDER;

/// How much of a line is shown.
const SHOWN: usize = 600;

/// A line of a log: which file, which line of it, from zero.
pub(crate) type Place = (usize, usize);

#[derive(Debug, Default)]
pub(crate) struct History {
    files: Vec<PathBuf>,
    pub(crate) known: HashMap<Uuid, Known>,
    /// The messages of the topic `order` as they were pushed, and as they were got.
    pub(crate) pushed_in_order: HashMap<Uuid, usize>,
    pub(crate) got_in_order: Vec<(Uuid, i64, Place)>,
    /// Those that say all the time whether they are served, by file.
    pub(crate) clients: BTreeMap<usize, Client>,
    /// When a fault ended, and in what time all clients have to be served again.
    pub(crate) mended: Vec<(i64, i64, Place)>,
    /// From when to when commits may have been lost with a server that a standby took over from.
    pub(crate) windows: Vec<(i64, i64)>,
    /// The keys of tokens that servers handed out which are gone, and when.
    pub(crate) granted: HashMap<String, i64>,
    /// When all tables were audited, how long that took, and what rules were found broken.
    pub(crate) audits: Vec<(i64, i64)>,
    pub(crate) broken: Vec<(Place, usize)>,
    pub(crate) is_audited: bool,
    /// For how long a message that bounces may be out of sight.
    pub(crate) reach: Option<i64>,
    /// How often the server's clock was stepped.
    pub(crate) steps: u64,
    pub(crate) calm: Option<(i64, i64)>,
    pub(crate) drained: Option<i64>,
    pub(crate) lines: u64,
    pub(crate) torn: u64,
}

/// From when to when a client was there, and when it was served meanwhile.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) begun: i64,
    pub(crate) ended: Option<i64>,
    pub(crate) alive: Vec<i64>,
    pub(crate) place: Place,
}

/// What is known of a message.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) push: Option<Pushed>,
    pub(crate) grants: Vec<Grant>,
    pub(crate) settles: Vec<Settle>,
    pub(crate) works: Vec<(i64, Place)>,
}

#[derive(Debug)]
pub(crate) struct Pushed {
    pub(crate) topic: Box<str>,
    pub(crate) name: Box<str>,
    pub(crate) hash: u64,
    pub(crate) calls: u32,
    /// When the last call that succeeded was answered.
    pub(crate) answered: Option<i64>,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub(crate) fence: i64,
    pub(crate) wall: i64,
    pub(crate) deadline: i64,
    pub(crate) hash: u64,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Settle {
    pub(crate) fence: i64,
    pub(crate) verb: Verb,
    /// When it began, and when it was answered.
    pub(crate) wall: i64,
    pub(crate) answered: Option<i64>,
    pub(crate) outcome: Outcome,
    pub(crate) place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Complete,
    Discard,
    Back,
    Extend,
}

impl Verb {
    /// The message is done with.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Verb::Complete | Verb::Discard)
    }
}

impl Settle {
    /// Whether it may have ended the delivery.
    pub(crate) fn may_have_ended(&self) -> bool {
        self.verb != Verb::Extend && matches!(self.outcome, Outcome::Ok | Outcome::Unknown)
    }
}

/// Calls of one file that have begun.
#[derive(Default)]
struct Open {
    pushes: HashMap<u64, Vec<Uuid>>,
    settles: HashMap<u64, Vec<(Uuid, usize)>>,
}

impl History {
    /// Reads all logs of a directory.
    pub(crate) fn read(dir: &Path) -> Result<History, BoxError> {
        let mut history = History::default();
        let mut files: Vec<PathBuf> =
            fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_, BoxError>>()?;
        files.retain(|path| path.extension().is_some_and(|ext| ext == "log"));
        files.sort();
        for path in files {
            history.read_file(&path)?;
        }
        Ok(history)
    }

    pub(crate) fn read_file(&mut self, path: &Path) -> Result<(), BoxError> {
        let file = self.files.len();
        self.files.push(path.to_owned());
        let mut reader = BufReader::new(File::open(path)?);
        let (mut open, mut line, mut text) = (Open::default(), 0, String::new());
        while reader.read_line(&mut text)? > 0 {
            // The last line of a process that was killed may be torn, even where what is left of it can be read.
            if !text.ends_with('\n') {
                self.torn += 1;
                break;
            }
            let (wall, entry) = Entry::read(text.trim_end_matches('\n'))
                .ok_or_else(|| format!("{}: line {} is none of ours: {text}", path.display(), line + 1))?;
            self.note(&mut open, (file, line), wall, entry);
            self.lines += 1;
            line += 1;
            text.clear();
        }
        Ok(())
    }

    fn note(&mut self, open: &mut Open, place: Place, wall: i64, entry: Entry) {
        match entry {
            Entry::Push { call, topic, id, name, hash } => {
                if topic == ORDER {
                    let next = self.pushed_in_order.len();
                    self.pushed_in_order.entry(id).or_insert(next);
                }
                open.pushes.entry(call).or_default().push(id);
                let push = &mut self.known.entry(id).or_default().push;
                let push = push.get_or_insert_with(|| Pushed {
                    topic: topic.into(),
                    name: name.into(),
                    hash,
                    calls: 0,
                    answered: None,
                    place,
                });
                push.calls += 1;
            }
            Entry::Pushed { call, outcome } => {
                for id in open.pushes.remove(&call).unwrap_or_default() {
                    if let Some(push) = self.known.entry(id).or_default().push.as_mut()
                        && outcome == Outcome::Ok
                    {
                        push.answered = Some(wall);
                    }
                }
            }
            Entry::Grant { id, fence, deadline, hash } => {
                if self.pushed_in_order.contains_key(&id) {
                    self.got_in_order.push((id, fence, place));
                }
                let grant = Grant { fence, wall, deadline, hash, place };
                self.known.entry(id).or_default().grants.push(grant);
            }
            Entry::Work(deliveries) => {
                for (id, fence) in deliveries {
                    self.known.entry(id).or_default().works.push((fence, place));
                }
            }
            Entry::Settle { call, verb, deliveries } => {
                let verb = match verb.as_str() {
                    "complete" => Verb::Complete,
                    "discard" => Verb::Discard,
                    _ => Verb::Back,
                };
                self.begin(open, call, verb, deliveries, wall, place);
            }
            Entry::Extend { call, id, fence } => {
                self.begin(open, call, Verb::Extend, vec![(id, fence)], wall, place);
            }
            Entry::Settled { call, outcome, lost } => {
                for (id, at) in open.settles.remove(&call).unwrap_or_default() {
                    let outcome = if lost.contains(&id) { Outcome::Lost } else { outcome };
                    if let Some(settle) = self.known.entry(id).or_default().settles.get_mut(at) {
                        settle.outcome = outcome;
                        settle.answered = Some(wall);
                    }
                }
            }
            Entry::Extended { call, outcome, deadline } => {
                for (id, at) in open.settles.remove(&call).unwrap_or_default() {
                    let known = self.known.entry(id).or_default();
                    let Some(settle) = known.settles.get_mut(at) else { continue };
                    settle.outcome = outcome;
                    settle.answered = Some(wall);
                    let fence = settle.fence;
                    for grant in
                        known.grants.iter_mut().filter(|g| g.fence == fence && outcome == Outcome::Ok)
                    {
                        grant.deadline = grant.deadline.max(deadline);
                    }
                }
            }
            Entry::Begun => {
                let client = Client { begun: wall, ended: None, alive: Vec::new(), place };
                self.clients.insert(place.0, client);
            }
            Entry::Alive => {
                self.clients.entry(place.0).and_modify(|client| client.alive.push(wall));
            }
            Entry::Ended => {
                self.clients.entry(place.0).and_modify(|client| client.ended = Some(wall));
            }
            Entry::Mended { within } => self.mended.push((wall, within, place)),
            Entry::Window { from, to } => self.windows.push((from, to)),
            Entry::Granted { key, at } => {
                self.granted.insert(key, at);
            }
            Entry::Step => self.steps += 1,
            Entry::Audited { took } => self.audits.push((wall, took)),
            Entry::Broken => self.broken.push((place, 0)),
            Entry::Row => {
                if let Some((_, rows)) = self.broken.last_mut() {
                    *rows += 1;
                }
            }
            Entry::Reach { within, audits } => (self.reach, self.is_audited) = (Some(within), audits > 0),
            Entry::Calm { bound } => self.calm = Some((wall, bound)),
            Entry::Drained => self.drained = Some(wall),
            Entry::Other => {}
        }
    }

    fn begin(
        &mut self,
        open: &mut Open,
        call: u64,
        verb: Verb,
        deliveries: Vec<(Uuid, i64)>,
        wall: i64,
        place: Place,
    ) {
        for (id, fence) in deliveries {
            let settles = &mut self.known.entry(id).or_default().settles;
            open.settles.entry(call).or_default().push((id, settles.len()));
            settles.push(Settle { fence, verb, wall, answered: None, outcome: Outcome::Unknown, place });
        }
    }

    /// Whether what happened within some time may have been lost with a server that a standby took over from.
    pub(crate) fn may_be_lost(&self, from: i64, to: i64) -> bool {
        self.windows.iter().any(|(begin, end)| from <= *end && to >= *begin)
    }

    /// Whether a part of what clients know of a message may have been lost so.
    pub(crate) fn is_doubtful(&self, known: &Known) -> bool {
        let pushed = known.push.iter().filter_map(|push| push.answered).map(|at| (at, at));
        let granted = known.grants.iter().map(|grant| (grant.wall, grant.wall));
        // Without an answer, it may have been carried out at any time since.
        let settled = known.settles.iter().map(|s| (s.wall, s.answered.unwrap_or(i64::MAX)));
        pushed.chain(granted).chain(settled).any(|(from, to)| self.may_be_lost(from, to))
    }

    /// The line of a place, with the name of its file.
    pub(crate) fn line(&self, (file, line): Place) -> String {
        let Some(path) = self.files.get(file) else { return String::new() };
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = File::open(path).ok().and_then(|file| BufReader::new(file).lines().nth(line)?.ok());
        let mut text = text.unwrap_or_default();
        if text.len() > SHOWN {
            text.truncate(SHOWN);
            text.push_str(" ..");
        }
        format!("{name}:{}: {text}", line + 1)
    }
}
