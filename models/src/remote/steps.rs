//! Who may do what when, and what comes of it.

use super::{Action, Branch, Driver, Flaw, Look, Mail, Recoverer, Remote, State, Status, Tx, Vote, Work};
use crate::Decision::{self, Abort, Commit};

const VOTES: [Vote; 3] = [Vote::Yes, Vote::No, Vote::ReadOnly];
const PREPARE: u8 = 1;

impl<const N: usize> Remote<N> {
    pub(super) fn of_driver(&self, state: &State<N>, actions: &mut Vec<Action>) {
        let all = &state.branches;
        let each = |fits: &dyn Fn(&Branch) -> bool, action: fn(usize) -> Action| {
            (0..N).filter(|at| fits(&all[*at])).map(action).collect::<Vec<_>>()
        };
        match state.driver {
            Driver::Ready => actions.push(Action::Begin),
            Driver::Beginning => actions.push(Action::Begun),
            Driver::Collecting => {
                actions.extend(each(&|b| !b.given, Action::Give));
                actions.extend(each(&|b| b.heard.is_none() && b.mail.is_some(), Action::Hear));
                let mut heard = all.iter().map(|b| b.heard);
                if heard.clone().all(|vote| vote == Some(Vote::ReadOnly)) {
                    actions.push(Action::DriverForgets);
                } else if heard.all(|vote| matches!(vote, Some(Vote::Yes | Vote::ReadOnly))) {
                    actions.push(Action::ChooseCommit);
                }
                actions.push(Action::ChooseAbort);
            }
            Driver::Deciding { .. } | Driver::Refused { .. } => actions.push(Action::DriverDecides),
            Driver::Telling(decision) => {
                actions.extend(each(&|b| !b.done, Action::Tell));
                actions.extend(each(&|b| !b.done, Action::DriverPasses));
                let early = self.flaw == Some(Flaw::ForgetsEarly) && decision == Commit;
                if early || all.iter().all(|b| b.done) {
                    actions.push(Action::DriverForgets);
                }
            }
            Driver::Readying | Driver::Gone => {}
        }
        if state.driver != Driver::Gone {
            actions.push(Action::DriverCrashes);
        }
        let late = [Commit, Abort].into_iter().filter(|decision| state.late[*decision as usize]);
        actions.extend(late.map(Action::LateDecide));
    }

    pub(super) fn of_recoverer(&self, state: &State<N>, actions: &mut Vec<Action>) {
        match state.recoverer {
            Recoverer::Idle if state.tx == Tx::Stands => actions.push(Action::RecovererLooks),
            Recoverer::Idle | Recoverer::Dead | Recoverer::SawReady => return,
            Recoverer::SawNoDecision => actions.push(Action::RecovererLooks),
            Recoverer::SawUndecided => actions.push(Action::RecovererAborts),
            Recoverer::Telling(_) => {
                actions.extend((0..N).map(Action::RecovererPasses));
                if state.branches.iter().all(|b| b.passed) {
                    actions.push(Action::RecovererForgets);
                }
            }
        }
        actions.push(Action::RecovererRestarts);
    }

    pub(super) fn of_participants(&self, state: &State<N>, actions: &mut Vec<Action>) {
        for (at, branch) in state.branches.iter().enumerate() {
            if branch.work.is_some() {
                actions.push(Action::Serve(at));
            }
            if branch.calls & PREPARE != 0 {
                actions.extend(VOTES.into_iter().map(|vote| Action::PrepareArrives(at, vote)));
            }
            let told = [Commit, Abort].into_iter().filter(|decision| branch.calls & call(*decision) != 0);
            actions.extend(told.map(|decision| Action::EndArrives(at, decision)));
            if branch.work == Some(Work::Prepare) || self.flaw == Some(Flaw::VotesUnchecked) {
                let votes = VOTES.into_iter().filter(|vote| branch.votes & (1 << *vote as u8) != 0);
                actions.extend(votes.map(|vote| Action::Votes(at, vote)));
            }
            if let Some(Work::End(decision)) = branch.work
                && branch.has_ended(decision)
            {
                actions.push(Action::Confirms(at));
            }
            actions.push(Action::Look(at));
        }
    }

    pub(super) fn step(&self, state: &mut State<N>, action: Action) {
        match action {
            Action::Begin | Action::Begun | Action::Give(_) | Action::Hear(_) => self.begin(state, action),
            Action::ChooseCommit => state.driver = Driver::Deciding { wanted: Commit, unsure: false },
            Action::ChooseAbort => state.driver = Driver::Deciding { wanted: Abort, unsure: false },
            Action::DriverDecides => self.driver_decides(state),
            Action::Tell(at) => self.tell(state, at),
            Action::DriverPasses(at) => {
                let commits = state.driver == Driver::Telling(Commit);
                let branch = &mut state.branches[at];
                branch.done |= match commits {
                    // The letter, or that the work record is gone.
                    true => branch.mail == Some(Mail::Done) || branch.work.is_none(),
                    // Nobody waits for the confirmation of an abort; but everybody is told.
                    false => branch.work != Some(Work::Prepare),
                };
            }
            Action::DriverForgets => {
                state.driver = Driver::Gone;
                state.forget();
            }
            Action::DriverCrashes => {
                if let Driver::Deciding { wanted, .. } = state.driver {
                    state.late[wanted as usize] = true;
                }
                state.driver = Driver::Gone;
            }
            Action::LateDecide(decision) => drop(self.decide(state, decision, decision == Commit)),
            Action::RecovererLooks
            | Action::RecovererAborts
            | Action::RecovererPasses(_)
            | Action::RecovererForgets
            | Action::RecovererRestarts => self.recover(state, action),
            Action::Serve(at) => {
                let branch = &mut state.branches[at];
                branch.calls |= match branch.work {
                    Some(Work::Prepare) => PREPARE,
                    Some(Work::End(decision)) => call(decision),
                    None => 0,
                };
            }
            Action::PrepareArrives(at, vote) => state.branches[at].prepare(vote),
            Action::EndArrives(at, decision) => state.end(at, decision),
            Action::Votes(at, vote) => {
                let branch = &mut state.branches[at];
                branch.mail = Some(Mail::Vote(vote));
                if vote != Vote::Yes {
                    branch.work = None;
                }
            }
            Action::Confirms(at) => {
                let branch = &mut state.branches[at];
                if branch.work.take() == Some(Work::End(Commit)) {
                    branch.mail = Some(Mail::Done);
                }
            }
            Action::Look(at) => state.look(at),
        }
    }

    fn begin(&self, state: &mut State<N>, action: Action) {
        match action {
            Action::Begin => {
                state.tx = Tx::Stands;
                state.driver = Driver::Beginning;
                if !self.piecemeal {
                    for branch in &mut state.branches {
                        (branch.work, branch.given) = (Some(Work::Prepare), true);
                    }
                }
            }
            Action::Begun => state.driver = Driver::Collecting,
            Action::Give(at) => {
                let undecided = state.decision.is_none() || self.flaw == Some(Flaw::GivesWorkAfterDecision);
                if state.tx == Tx::Stands && undecided {
                    state.branches[at].work = Some(Work::Prepare);
                }
                state.branches[at].given = true;
            }
            Action::Hear(at) => {
                if let Some(Mail::Vote(vote)) = state.branches[at].mail {
                    state.branches[at].heard = Some(vote);
                }
            }
            _ => {}
        }
    }

    fn driver_decides(&self, state: &mut State<N>) {
        match state.driver {
            Driver::Deciding { wanted, unsure } => {
                if self.decide(state, wanted, true) {
                    state.driver = Driver::Telling(wanted);
                } else {
                    state.driver = Driver::Refused { wanted, unsure };
                }
            }
            Driver::Refused { wanted, unsure } => {
                state.driver = match (state.decision, state.tx) {
                    (Some(decision), _) => Driver::Telling(decision),
                    (None, Tx::Stands) => Driver::Deciding { wanted, unsure },
                    (None, _) => Driver::Gone,
                };
            }
            _ => {}
        }
    }

    /// One step at the store. The driver puts the outcome into the work records in the same step, except where it has
    /// heard that somebody is out.
    fn decide(&self, state: &mut State<N>, decision: Decision, tells: bool) -> bool {
        if state.tx != Tx::Stands || state.decision.is_some() {
            return false;
        }
        state.decision = Some(decision);
        state.history[decision as usize] = true;
        if tells && !self.piecemeal {
            for branch in state.branches.iter_mut().filter(|b| !matches!(b.heard, Some(Vote::No | Vote::ReadOnly))) {
                // A late commit comes from a driver that is gone: whoever is out has no work record.
                if branch.work.is_some() || branch.heard.is_none() && decision == Abort {
                    branch.work = Some(Work::End(decision));
                }
            }
        }
        true
    }

    fn tell(&self, state: &mut State<N>, at: usize) {
        let Driver::Telling(decision) = state.driver else { return };
        let branch = &mut state.branches[at];
        let waits = branch.work == Some(Work::Prepare);
        let over_all =
            self.flaw == Some(Flaw::TellsTheConfirmed) && !matches!(branch.status, Status::Out | Status::Refused);
        if state.tx == Tx::Stands && (waits || over_all) {
            branch.work = Some(Work::End(decision));
        }
    }

    fn recover(&self, state: &mut State<N>, action: Action) {
        let next = match (action, state.recoverer) {
            (Action::RecovererLooks, Recoverer::Idle) => match state.decision {
                Some(decision) => Recoverer::Telling(decision),
                None => Recoverer::SawNoDecision,
            },
            (Action::RecovererLooks, _) if state.tx == Tx::Stands => Recoverer::SawUndecided,
            (Action::RecovererAborts, _) if self.decide(state, Abort, false) => Recoverer::Telling(Abort),
            (Action::RecovererPasses(at), Recoverer::Telling(decision)) => {
                let stands = state.tx == Tx::Stands;
                let branch = &mut state.branches[at];
                if branch.work == Some(Work::Prepare) && stands {
                    branch.work = Some(Work::End(decision));
                }
                branch.passed |= branch.work.is_none() || (decision == Abort && branch.work != Some(Work::Prepare));
                Recoverer::Telling(decision)
            }
            (Action::RecovererForgets, _) => {
                state.forget();
                Recoverer::Idle
            }
            (Action::RecovererRestarts, Recoverer::SawUndecided) => {
                state.late[Abort as usize] = true;
                Recoverer::Idle
            }
            _ => Recoverer::Idle,
        };
        if !matches!(next, Recoverer::Telling(_)) {
            state.branches.iter_mut().for_each(|b| b.passed = false);
        }
        state.recoverer = next;
    }
}

impl<const N: usize> State<N> {
    fn forget(&mut self) {
        if self.tx == Tx::Stands {
            (self.tx, self.decision) = (Tx::Over, None);
            self.branches.iter_mut().for_each(|b| b.mail = None);
        }
    }

    fn end(&mut self, at: usize, decision: Decision) {
        let branch = &mut self.branches[at];
        match (branch.status, decision) {
            (Status::Prepared, Commit) => branch.status = Status::Committed,
            (Status::Working | Status::Prepared, Abort) => branch.status = Status::Aborted,
            (Status::Committed, Abort) | (Status::Aborted, Commit) => self.history[2] = true,
            _ => {}
        }
    }

    /// As in `decision_record`; the abort that follows is a call of the resource.
    fn look(&mut self, at: usize) {
        let branch = &mut self.branches[at];
        let prepared = branch.status == Status::Prepared;
        branch.look = match branch.look {
            Look::No if prepared => Look::Prepared,
            Look::Prepared if self.decision.is_none() => Look::NoDecision,
            Look::NoDecision if self.tx != Tx::Stands => Look::Over,
            Look::Over if prepared => {
                branch.calls |= call(Abort);
                Look::No
            }
            _ => Look::No,
        };
    }

    /// Takes out what makes no difference any more.
    pub(super) fn tidy(&mut self) {
        let (collecting, telling) = match self.driver {
            // What it has heard says whom the decision has to tell.
            Driver::Ready | Driver::Beginning | Driver::Collecting | Driver::Deciding { .. } => (true, false),
            Driver::Telling(_) => (false, true),
            Driver::Readying | Driver::Refused { .. } | Driver::Gone => (false, false),
        };
        for branch in &mut self.branches {
            if !collecting {
                (branch.heard, branch.given) = (None, false);
            }
            branch.done &= telling;
        }
        self.branches.sort_unstable();
    }
}

impl Branch {
    fn prepare(&mut self, vote: Vote) {
        let vote = match self.status {
            Status::Working => vote,
            Status::Prepared => Vote::Yes,
            Status::Committed | Status::Aborted => {
                self.votes |= 1 << Vote::No as u8;
                return;
            }
            Status::Refused => Vote::No,
            Status::Out => Vote::ReadOnly,
        };
        self.votes |= 1 << vote as u8;
        self.status = match vote {
            Vote::Yes => Status::Prepared,
            Vote::No => Status::Refused,
            Vote::ReadOnly => Status::Out,
        };
    }

    fn has_ended(&self, decision: Decision) -> bool {
        match decision {
            Commit => matches!(self.status, Status::Committed | Status::Out),
            Abort => matches!(self.status, Status::Aborted | Status::Refused | Status::Out),
        }
    }
}

fn call(decision: Decision) -> u8 {
    match decision {
        Commit => 2,
        Abort => 4,
    }
}
