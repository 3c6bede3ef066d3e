//! Who may do what when, and what comes of it.

use super::{Action, Branch, DecisionRecord, Driver, Flaw, Look, Recoverer, State, Status, Tx, Vote};
use crate::Decision::{self, Abort, Commit};

const VOTES: [Vote; 3] = [Vote::Yes, Vote::No, Vote::ReadOnly];

impl<const N: usize> DecisionRecord<N> {
    pub(super) fn of_driver(&self, state: &State<N>, actions: &mut Vec<Action>) {
        let heard = || state.branches.iter().map(|b| b.heard);
        match state.driver {
            Driver::Ready => actions.push(Action::SendBegin),
            // It may hear of it late, when others have finished the transaction.
            Driver::Beginning if state.tx != Tx::Ahead => actions.push(Action::Begun),
            Driver::Beginning | Driver::Gone => {}
            Driver::Collecting => {
                for (at, branch) in state.branches.iter().enumerate().filter(|(_, b)| b.heard.is_none()) {
                    let arriving = VOTES.into_iter().filter(|vote| branch.votes & bit(*vote) != 0);
                    actions.extend(arriving.map(|vote| Action::HearVote(at, vote)));
                }
                if heard().all(|vote| vote == Some(Vote::ReadOnly)) {
                    actions.push(Action::NothingToDo);
                } else if heard().all(|vote| matches!(vote, Some(Vote::Yes | Vote::ReadOnly))) {
                    actions.push(Action::ChooseCommit);
                }
                actions.push(Action::ChooseAbort);
            }
            Driver::Readying => actions.extend([Action::DriverIsReady, Action::DriverLosesReply]),
            Driver::Deciding { .. } => actions.extend([Action::DriverDecides, Action::DriverLosesReply]),
            Driver::Refused { .. } => actions.push(Action::DriverLooks),
            Driver::Telling(decision) => {
                // Who has refused, and who is out of a commit, need not be told.
                let silent =
                    |b: &Branch| b.status == Status::Refused || (decision == Commit && b.status == Status::Out);
                if self.may_forget(state, silent) {
                    actions.push(Action::DriverForgets);
                }
            }
        }
        if state.driver != Driver::Gone {
            actions.push(Action::DriverCrashes);
        }
    }

    pub(super) fn of_recoverers(&self, state: &State<N>, actions: &mut Vec<Action>) {
        for (at, recoverer) in state.recoverers.iter().enumerate() {
            match recoverer {
                Recoverer::Dead => continue,
                Recoverer::Idle if state.tx == Tx::Stands => actions.push(Action::RecovererLooks(at)),
                Recoverer::Idle => {}
                Recoverer::SawNoDecision => actions.push(Action::RecovererLooksAgain(at)),
                Recoverer::SawUndecided => {
                    actions.extend([Action::RecovererAborts(at), Action::RecovererLosesReply(at)]);
                    if self.has(Flaw::RecovererGuesses) && state.any(Status::Prepared) {
                        actions.push(Action::RecovererCommits(at));
                    }
                }
                Recoverer::SawReady => {
                    actions.extend([Action::RecovererCommits(at), Action::RecovererLosesReply(at)]);
                }
                // It does not know who is out, and tells everybody.
                Recoverer::Telling(_) => {
                    actions.extend((0..N).map(|whom| Action::RecovererTells(at, whom)));
                    if self.may_forget(state, |_| false) {
                        actions.push(Action::RecovererForgets(at));
                    }
                }
            }
            actions.push(Action::RecovererCrashes(at));
        }
    }

    pub(super) fn of_network(&self, state: &State<N>, actions: &mut Vec<Action>) {
        let on_the_way = &state.on_the_way;
        let sent = [
            (on_the_way.begin, Action::BeginLands),
            (on_the_way.decide_commit, Action::LateDecide(Commit)),
            (on_the_way.decide_abort, Action::LateDecide(Abort)),
            (on_the_way.ready, Action::LateReady),
            (on_the_way.forget, Action::ForgetLands),
        ];
        actions.extend(sent.into_iter().filter_map(|(sent, action)| sent.then_some(action)));
        if self.operator && state.tx == Tx::Stands && state.decision.is_none() {
            actions.push(Action::OperatorDecides(Abort));
            if state.branches.iter().all(|b| matches!(b.status, Status::Prepared | Status::Out)) {
                actions.push(Action::OperatorDecides(Commit));
            }
        }
        if state.by_hand.is_some() && self.has(Flaw::AcknowledgesEarly) {
            actions.push(Action::Acknowledge);
        }
        for (at, branch) in state.branches.iter().enumerate() {
            if on_the_way.prepare {
                actions.extend(VOTES.into_iter().map(|vote| Action::PrepareArrives(at, vote)));
            }
            if on_the_way.commit {
                actions.push(Action::CommitArrives(at));
            }
            if on_the_way.abort {
                actions.push(Action::AbortArrives(at));
            }
            if state.is_recovered() && !self.has(Flaw::NoTombstonesNoLook) {
                actions.push(Action::Look(at));
            }
            if branch.look == Look::Aborting {
                actions.push(Action::OrphanAbortArrives(at));
            }
            if self.has(Flaw::TimesOutAlone) && branch.status == Status::Prepared {
                actions.push(Action::TimesOut(at));
            }
        }
    }

    pub(super) fn step(&self, state: &mut State<N>, action: Action) {
        match action {
            Action::SendBegin => {
                state.driver = Driver::Beginning;
                state.on_the_way.begin = true;
                state.on_the_way.prepare = self.has(Flaw::PreparesBeforeBegun);
            }
            Action::BeginLands => {
                // An id is never used twice, so there is none, except after an attempt that was made again.
                if state.tx != Tx::Stands {
                    state.tx = Tx::Stands;
                }
                state.on_the_way.begin = self.has(Flaw::BeginsAgain);
            }
            Action::Begun => {
                state.driver = Driver::Collecting;
                state.on_the_way.prepare = true;
            }
            Action::PrepareArrives(at, vote) => self.prepare(state, at, vote),
            Action::HearVote(at, vote) => state.branches[at].heard = Some(vote),
            Action::ChooseCommit if self.has(Flaw::DriverDecidesAlone) => state.driver_tells(Commit),
            Action::ChooseCommit if self.pre_commits => state.driver = Driver::Readying,
            Action::ChooseCommit => state.driver = Driver::Deciding { wanted: Commit, unsure: false },
            Action::ChooseAbort => state.driver = Driver::Deciding { wanted: Abort, unsure: false },
            Action::NothingToDo | Action::DriverForgets => {
                state.driver = Driver::Gone;
                state.on_the_way.forget = true;
            }
            Action::DriverDecides | Action::DriverLosesReply | Action::DriverLooks | Action::DriverCrashes => {
                self.driver_settles(state, action);
            }
            Action::DriverIsReady => {
                self.get_ready(state);
                // If others have decided, the store will say so.
                state.driver = Driver::Deciding { wanted: Commit, unsure: false };
            }
            Action::LateReady => self.get_ready(state),
            Action::LateDecide(decision) => drop(self.decide(state, decision)),
            Action::OperatorDecides(decision) => {
                if self.decide(state, decision) {
                    state.by_hand = Some(decision);
                }
            }
            Action::Acknowledge => state.by_hand = None,
            Action::ForgetLands => {
                if state.tx == Tx::Stands {
                    (state.tx, state.decision, state.ready) = (Tx::Over, None, false);
                }
            }
            Action::CommitArrives(at) => state.commit_arrives(at),
            Action::AbortArrives(at) => state.abort_arrives(at),
            Action::Look(at) => self.look(state, at),
            Action::OrphanAbortArrives(at) => state.abort_arrives(at),
            Action::TimesOut(at) => state.branches[at].status = Status::Aborted,
            Action::RecovererTells(at, whom) => match state.recoverers[at] {
                Recoverer::Telling(Commit) => state.commit_arrives(whom),
                Recoverer::Telling(Abort) => state.abort_arrives(whom),
                _ => {}
            },
            Action::RecovererLooks(at)
            | Action::RecovererLooksAgain(at)
            | Action::RecovererAborts(at)
            | Action::RecovererCommits(at)
            | Action::RecovererLosesReply(at)
            | Action::RecovererForgets(at)
            | Action::RecovererCrashes(at) => self.recover(state, action, at),
        }
    }

    fn driver_settles(&self, state: &mut State<N>, action: Action) {
        match (action, state.driver) {
            (Action::DriverDecides, Driver::Deciding { wanted, unsure }) => {
                if self.decide(state, wanted) {
                    state.driver_tells(wanted);
                } else {
                    state.driver = Driver::Refused { wanted, unsure };
                }
            }
            (Action::DriverLosesReply, Driver::Readying) => state.on_the_way.ready = true,
            (Action::DriverLosesReply, Driver::Deciding { wanted, .. }) => {
                state.leave_behind(wanted);
                state.driver = Driver::Deciding { wanted, unsure: true };
            }
            (Action::DriverLooks, Driver::Refused { wanted, unsure }) => match (state.decision, state.tx) {
                (Some(decision), _) => state.driver_tells(decision),
                (None, Tx::Stands) => state.driver = Driver::Deciding { wanted, unsure },
                // Its own may have been carried out and forgotten by others, or what it has found all in favour of:
                // nobody is told anything.
                (None, _) if wanted == Commit && (unsure || self.knows_ready()) => state.driver = Driver::Gone,
                // Recoverers only abort, so only by hand can it have been committed.
                (None, _) => {
                    let by_hand = state.by_hand.filter(|_| !self.has(Flaw::OverMeansAborted));
                    state.tell(by_hand.unwrap_or(Abort));
                    state.driver = Driver::Gone;
                }
            },
            (Action::DriverCrashes, driver) => {
                match driver {
                    Driver::Readying => state.on_the_way.ready = true,
                    Driver::Deciding { wanted, .. } => state.leave_behind(wanted),
                    _ => {}
                }
                state.driver = Driver::Gone;
            }
            _ => {}
        }
    }

    fn recover(&self, state: &mut State<N>, action: Action, at: usize) {
        state.recoverers[at] = match action {
            Action::RecovererLooks(_) => match state.decision {
                Some(decision) => state.recoverer_tells(decision),
                None => Recoverer::SawNoDecision,
            },
            Action::RecovererLooksAgain(_) if state.ready => Recoverer::SawReady,
            Action::RecovererLooksAgain(_) if state.tx == Tx::Stands => Recoverer::SawUndecided,
            Action::RecovererAborts(_) if self.decide(state, Abort) => state.recoverer_tells(Abort),
            Action::RecovererCommits(_) if self.decide(state, Commit) => state.recoverer_tells(Commit),
            Action::RecovererLosesReply(_) => {
                state.abandons(at);
                Recoverer::Idle
            }
            Action::RecovererForgets(_) => {
                state.on_the_way.forget = true;
                Recoverer::Idle
            }
            Action::RecovererCrashes(_) => {
                state.abandons(at);
                Recoverer::Dead
            }
            _ => Recoverer::Idle,
        };
    }

    /// The one step at the store that decides.
    fn decide(&self, state: &mut State<N>, decision: Decision) -> bool {
        let checked = state.tx == Tx::Stands || self.has(Flaw::DecidesUnchecked);
        // An abort stands back behind what all are in favour of.
        let ready = state.ready && decision == Abort && !self.has(Flaw::AbortsTheReady);
        if !checked || ready || state.decision.is_some() {
            return false;
        }
        state.decision = Some(decision);
        match decision {
            Commit => state.history.commit = true,
            Abort => state.history.abort = true,
        }
        true
    }

    /// One step at the store, too.
    fn get_ready(&self, state: &mut State<N>) {
        let checked = state.tx == Tx::Stands || self.has(Flaw::ReadyUnchecked);
        if checked && state.decision.is_none() {
            (state.ready, state.history.ready) = (true, true);
        }
    }

    /// What is prepared at the first look was begun before it. So if it is over at the second, only a prepare that came
    /// late can be the reason that it is prepared at the third.
    fn look(&self, state: &mut State<N>, at: usize) {
        let branch = &mut state.branches[at];
        let prepared = branch.status == Status::Prepared;
        branch.look = match branch.look {
            Look::No if prepared => Look::Prepared,
            Look::Prepared if state.decision.is_none() => Look::NoDecision,
            Look::NoDecision if state.tx != Tx::Stands => Look::Over,
            Look::Over if prepared || self.has(Flaw::LooksOnce) => Look::Aborting,
            Look::Aborting => Look::Aborting,
            Look::No | Look::Prepared | Look::NoDecision | Look::Over => Look::No,
        };
    }

    fn prepare(&self, state: &mut State<N>, at: usize, vote: Vote) {
        let forgetful = self.has(Flaw::NoTombstones) || self.has(Flaw::NoTombstonesNoLook);
        let branch = &mut state.branches[at];
        let vote = match branch.status {
            Status::Working => vote,
            Status::Aborted if forgetful => {
                state.history.moved_back = true;
                state.history.late_prepare |= vote == Vote::Yes;
                vote
            }
            Status::Prepared => Vote::Yes,
            Status::Committed | Status::Aborted => {
                branch.votes |= bit(Vote::No);
                return;
            }
            Status::Refused => Vote::No,
            Status::Out => Vote::ReadOnly,
        };
        branch.votes |= bit(vote);
        branch.status = match vote {
            Vote::Yes => Status::Prepared,
            Vote::No => Status::Refused,
            Vote::ReadOnly => Status::Out,
        };
    }

    fn may_forget(&self, state: &State<N>, silent: impl Fn(&Branch) -> bool) -> bool {
        self.has(Flaw::ForgetsEarly) || state.branches.iter().all(|b| b.confirmed || silent(b))
    }

    /// Whether a driver that has found all in favour keeps in mind that others may have committed.
    fn knows_ready(&self) -> bool {
        self.pre_commits && !self.has(Flaw::OverMeansAborted)
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

impl<const N: usize> State<N> {
    fn driver_tells(&mut self, decision: Decision) {
        self.tell(decision);
        self.driver = Driver::Telling(decision);
    }

    fn recoverer_tells(&mut self, decision: Decision) -> Recoverer {
        self.tell(decision);
        Recoverer::Telling(decision)
    }

    fn tell(&mut self, decision: Decision) {
        match decision {
            Commit => self.on_the_way.commit = true,
            Abort => self.on_the_way.abort = true,
        }
    }

    fn leave_behind(&mut self, decision: Decision) {
        match decision {
            Commit => self.on_the_way.decide_commit = true,
            Abort => self.on_the_way.decide_abort = true,
        }
    }

    fn abandons(&mut self, recoverer: usize) {
        match self.recoverers[recoverer] {
            Recoverer::SawUndecided => self.leave_behind(Abort),
            Recoverer::SawReady => self.leave_behind(Commit),
            _ => {}
        }
    }

    fn commit_arrives(&mut self, at: usize) {
        let branch = &mut self.branches[at];
        match branch.status {
            Status::Prepared => branch.status = Status::Committed,
            // It was never asked: it cannot.
            Status::Working => return,
            // Whoever has ended otherwise says so, and does not change.
            Status::Aborted => self.history.told_both = true,
            Status::Committed | Status::Refused | Status::Out => {}
        }
        branch.confirmed = true;
    }

    fn abort_arrives(&mut self, at: usize) {
        let branch = &mut self.branches[at];
        match branch.status {
            Status::Working | Status::Prepared => branch.status = Status::Aborted,
            Status::Committed => self.history.told_both = true,
            Status::Aborted | Status::Refused | Status::Out => {}
        }
        branch.confirmed = true;
    }

    /// Takes out what makes no difference any more.
    pub(super) fn tidy(&mut self) {
        if !matches!(self.driver, Driver::Ready | Driver::Beginning | Driver::Collecting) {
            for branch in &mut self.branches {
                (branch.votes, branch.heard) = (0, None);
            }
        }
        if self.driver == Driver::Gone {
            self.by_hand = None;
        }
        self.branches.sort_unstable();
        self.recoverers.sort_unstable();
    }
}

fn bit(vote: Vote) -> u8 {
    1 << vote as u8
}
