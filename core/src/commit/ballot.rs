//! The votes of one transaction, as its driver knows them.
//!
//! Promise: the transaction is committed only if every vote is known and none is anything but yes or read-only.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Decision, Vote,
    deliver::guarded,
    desk::LetterBox,
    drive::{Caller, Drive},
    log::Divergence,
    record::{BranchRecord, Mail, Says},
    steps::Step,
};

/// How long the others have after somebody has refused: most answer in time, and then nothing of theirs is cut short.
const AFTER_A_NO: Duration = Duration::from_millis(500);

/// One participant's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Yes,
    /// Out, with nothing left behind.
    ReadOnly,
    /// Out, with nothing left behind.
    No(String),
    /// Not a yes; whether something was prepared is not known.
    Unsure(String),
    /// Its answer was not waited for, because the outcome was clear without it.
    Unheard,
}

#[derive(Debug)]
pub(super) struct Ballot {
    /// In the order of the branches.
    answers: Vec<Option<Answer>>,
    /// Whoever waited for the outcome has gone.
    cancelled: bool,
    names: Vec<String>,
}

impl Ballot {
    pub(super) fn new(drive: &Drive) -> Self {
        let names: Vec<_> = drive.branches.iter().map(|b| b.name.clone()).collect();
        Self { answers: vec![None; names.len()], cancelled: false, names }
    }

    /// Nobody is asked, for this reason.
    pub(super) fn give_up(&mut self, why: &str) {
        self.close(|_| Answer::Unsure(why.to_owned()));
    }

    /// From now on nobody answers.
    fn close(&mut self, instead: impl Fn(usize) -> Answer) {
        for (place, answer) in self.answers.iter_mut().enumerate().filter(|(_, answer)| answer.is_none()) {
            *answer = Some(instead(place));
        }
    }

    /// Asks everybody at the same time, and waits for the answers.
    pub(super) async fn collect(&mut self, drive: &Drive, mut letters: Option<&mut LetterBox>, caller: &mut Caller) {
        let mut end = Instant::now() + drive.within;
        let mut asked = JoinSet::new();
        let mut places = HashMap::new();
        for (place, branch) in drive.branches.iter().enumerate() {
            let Some(ask) = ask(drive, branch) else { continue };
            places.insert(asked.spawn(ask).id(), place);
        }
        let mut refused = false;
        while self.answers.iter().any(Option::is_none) {
            if !refused && self.refusals().next().is_some() {
                refused = true;
                end = end.min(Instant::now() + AFTER_A_NO);
            }
            let news = async {
                match letters.as_mut() {
                    Some(letters) => letters.letters.changed().await.is_ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(answer) = asked.join_next_with_id(), if !asked.is_empty() => {
                    let (task, answer) = match answer {
                        Ok((task, answer)) => (task, answer),
                        Err(stopped) => (stopped.id(), Answer::Unsure("its task was stopped".to_owned())),
                    };
                    if let Some(place) = places.get(&task) {
                        self.answers[*place] = Some(answer);
                    }
                }
                true = news => {
                    if let Some(letters) = &mut letters {
                        self.read(drive, letters).await;
                    }
                }
                () = sleep_until(end) => break,
                () = caller.gone() => {
                    self.cancelled = true;
                    break;
                }
            }
        }
        // No prepare of this process goes on beside the abort that follows. One that never awaits cannot be stopped:
        // the participant has to refuse what comes late in any case.
        let _ = timeout(AFTER_A_NO, asked.shutdown()).await;
        let unheard = self.cancelled || refused;
        self.close(|place| match (unheard, drive.branches[place].remote) {
            (true, _) => Answer::Unheard,
            (false, false) => Answer::Unsure(format!("no answer within {:?}", drive.within)),
            (false, true) => Answer::Unsure(format!("no answer within {:?}; does anybody serve it?", drive.within)),
        });
    }

    async fn read(&mut self, drive: &Drive, letters: &mut LetterBox) {
        let arrived = letters.letters.borrow_and_update().clone();
        for (place, branch) in drive.branches.iter().enumerate().filter(|(_, branch)| branch.remote) {
            if let (None, Some(mail)) = (&self.answers[place], arrived.get(&branch.name)) {
                self.answers[place] = Some(answer(mail));
                drive.hook.at(drive.id, || Step::Voted(branch.name.clone())).await;
            }
        }
    }

    /// Everybody only looked: there is nothing to decide.
    pub(super) fn nothing_to_do(&self) -> bool {
        !self.cancelled && self.answers.iter().all(|answer| *answer == Some(Answer::ReadOnly))
    }

    pub(super) fn decision(&self) -> Decision {
        let fine = |answer: &Option<Answer>| matches!(answer, Some(Answer::Yes | Answer::ReadOnly));
        if !self.cancelled && self.answers.iter().all(fine) { Decision::Commit } else { Decision::Abort }
    }

    /// Who is against it, and why.
    pub(super) fn refusals(&self) -> impl Iterator<Item = (String, String)> {
        self.names.iter().zip(&self.answers).filter_map(|(name, answer)| match answer {
            Some(Answer::No(why) | Answer::Unsure(why)) => Some((name.clone(), why.clone())),
            _ => None,
        })
    }

    /// For people who look at the log; short, whatever participants say.
    pub(super) fn why(&self) -> String {
        let why: Vec<_> = self.refusals().map(|(name, why)| format!("{name}: {why}")).collect();
        why.join("; ").chars().take(500).collect()
    }

    /// The branches that have to be brought to the end: of those that are out, nothing was left behind.
    pub(super) fn to_finish<'a>(&'a self, drive: &'a Drive) -> impl Iterator<Item = &'a BranchRecord> {
        let open = |answer: &Option<Answer>| !matches!(answer, Some(Answer::No(_) | Answer::ReadOnly));
        drive.branches.iter().zip(&self.answers).filter(move |(_, answer)| open(answer)).map(|(branch, _)| branch)
    }

    /// Who cannot follow the decision. Nobody, unless it was made by hand.
    pub(super) fn against(&self, decision: Decision) -> Vec<Divergence> {
        let refused = self.names.iter().zip(&self.answers).filter_map(|(name, answer)| match (decision, answer) {
            (Decision::Commit, Some(Answer::No(why))) => Some((name, why)),
            _ => None,
        });
        refused
            .map(|(name, why)| Divergence { participant: name.clone(), what: format!("it voted no: {why}") })
            .collect()
    }

    /// The remote participants whose work record has to say how it ended.
    pub(super) fn remote_to_tell(&self, drive: &Drive) -> Vec<(String, Bytes)> {
        let remote = self.to_finish(drive).filter(|branch| branch.remote);
        remote.map(|branch| (branch.name.clone(), branch.body.clone())).collect()
    }
}

/// Asks a participant of this process.
fn ask(drive: &Drive, branch: &BranchRecord) -> Option<impl Future<Output = Answer> + Send + use<>> {
    let participant = drive.handles.get(&branch.name)?.clone();
    let (branch, within, hook) = (drive.branch(branch), drive.within, drive.hook.clone());
    let name = branch.participant.to_string();
    Some(async move {
        hook.at(branch.id, || Step::Prepare(name.clone())).await;
        let id = branch.id;
        let answer = match guarded(within, async move { participant.prepare(&branch).await }).await {
            Ok(Vote::Yes) => Answer::Yes,
            Ok(Vote::ReadOnly) => Answer::ReadOnly,
            Ok(Vote::No(why)) => Answer::No(why),
            Err(why) => Answer::Unsure(why),
        };
        hook.at(id, || Step::Voted(name.clone())).await;
        answer
    })
}

fn answer(mail: &Mail) -> Answer {
    match mail.says {
        Says::Yes => Answer::Yes,
        Says::ReadOnly => Answer::ReadOnly,
        Says::No => Answer::No(mail.why.clone()),
        Says::Failed => Answer::Unsure(mail.why.clone()),
        Says::Done => Answer::Unsure("it says that it has committed, and was not asked to".to_owned()),
    }
}
