//! Who may do what when, and what comes of it.

use super::{Action, Coordinator, Faults, Participant, Rule, State, Status, ThreePhase};
use crate::Decision::{self, Abort, Commit};

impl<const N: usize> ThreePhase<N> {
    pub(super) fn of_coordinator(&self, state: &State<N>, actions: &mut Vec<Action>) {
        let all = &state.participants;
        if state.coordinator == Coordinator::Dead {
            return;
        }
        let hearable = |p: &Participant| !p.dead && !p.far && p.says() > p.heard;
        actions.extend((0..N).filter(|at| hearable(&all[*at])).map(Action::Hear));
        match state.coordinator {
            Coordinator::Asking => {
                if all.iter().all(|p| p.heard >= 1) {
                    actions.push(Action::ChoosePreCommit);
                }
                if all.iter().any(|p| p.is_silent() || p.status == Status::Aborted) {
                    actions.push(Action::ChooseAbort);
                }
            }
            Coordinator::Recording | Coordinator::Deciding(_) => {
                if !state.store.far {
                    actions.push(Action::CoordinatorLooks);
                }
            }
            Coordinator::PreCommitting => {
                self.tell(state, 1, actions);
                // Who is silent is taken for dead, and would learn the outcome when it is back.
                if all.iter().all(|p| p.is_silent() || p.heard == 2) {
                    actions.push(Action::ChooseCommit);
                }
            }
            Coordinator::Telling(_) => self.tell(state, 2, actions),
            Coordinator::Dead => {}
        }
    }

    fn tell(&self, state: &State<N>, level: u8, actions: &mut Vec<Action>) {
        let mut open = (0..N).filter(|at| {
            let p = &state.participants[*at];
            p.told < level && !p.is_silent()
        });
        if self.faults == Faults::BetweenPhases {
            actions.extend(open.next().map(|_| Action::TellAll));
        } else {
            actions.extend(open.map(Action::Tell));
        }
    }

    pub(super) fn of_faults(&self, state: &State<N>, actions: &mut Vec<Action>) {
        if self.faults != Faults::Partition && state.coordinator != Coordinator::Dead {
            actions.push(Action::CoordinatorDies);
        }
        if matches!(self.faults, Faults::Crashes | Faults::Both) {
            actions.extend((0..N).filter(|at| !state.participants[*at].dead).map(Action::Dies));
        }
        if !matches!(self.faults, Faults::Partition | Faults::Both) {
            return;
        }
        if state.cut {
            actions.push(Action::Heal);
            return;
        }
        let stores = if self.rule == Rule::Record { [false, true].as_slice() } else { &[false] };
        for store in stores {
            actions.extend((0..1_u8 << N).map(|who| Action::Cut(who, *store)));
        }
    }

    pub(super) fn of_participants(&self, state: &State<N>, actions: &mut Vec<Action>) {
        for (at, p) in state.participants.iter().enumerate().filter(|(_, p)| !p.dead) {
            if p.status == Status::Working {
                actions.push(Action::VoteNo(at));
                if !p.far && state.coordinator == Coordinator::Asking {
                    actions.push(Action::VoteYes(at));
                }
            }
            if !p.far && p.has_mail() {
                actions.push(Action::Deliver(at));
            }
            match self.rule {
                Rule::Alone if state.is_timed_out(p) && p.is_in_doubt() => actions.push(Action::EndsAlone(at)),
                Rule::Termination if state.is_timed_out(p) => state.of_backup(at, actions),
                // At any time: it need not be right about the silence.
                Rule::Record if p.is_in_doubt() && p.far == state.store.far => actions.push(Action::Consults(at)),
                _ => {}
            }
        }
        let store = &state.store;
        let sent = [
            (store.sent_ready, Action::ReadyLands),
            (store.sent_commit, Action::DecisionLands(Commit)),
            (store.sent_abort, Action::DecisionLands(Abort)),
        ];
        actions.extend(sent.into_iter().filter_map(|(sent, action)| sent.then_some(action)));
    }

    pub(super) fn step(&self, state: &mut State<N>, action: Action) {
        match action {
            Action::VoteYes(at) => state.participants[at].status = Status::Prepared,
            Action::VoteNo(at) => state.participants[at].status = Status::Aborted,
            Action::Hear(at) => state.participants[at].heard = state.participants[at].says(),
            Action::ChoosePreCommit if self.rule == Rule::Record => {
                state.coordinator = Coordinator::Recording;
                state.store.sent_ready = true;
            }
            Action::ChoosePreCommit => state.coordinator = Coordinator::PreCommitting,
            Action::ChooseCommit => self.choose(state, Commit),
            Action::ChooseAbort => self.choose(state, Abort),
            Action::Tell(at) => state.tell(at),
            Action::TellAll => (0..N).for_each(|at| state.tell(at)),
            Action::Deliver(at) => state.participants[at].deliver(),
            Action::CoordinatorDies => state.coordinator = Coordinator::Dead,
            Action::Dies(at) => {
                state.participants[at].dead = true;
                state.participants[at].leads = None;
            }
            Action::Cut(who, store) => {
                state.cut = true;
                state.store.far = store;
                for (at, p) in state.participants.iter_mut().enumerate() {
                    p.far = who & (1 << at) != 0;
                }
            }
            Action::Heal => {
                state.cut = false;
                state.store.far = false;
                state.participants.iter_mut().for_each(|p| p.far = false);
            }
            Action::EndsAlone(at) => {
                let p = &mut state.participants[at];
                p.status = if p.status == Status::PreCommitted { Status::Committed } else { Status::Aborted };
            }
            Action::Leads(at) => {
                let ready = state.participants[at].status == Status::PreCommitted;
                state.participants[at].leads = Some(if ready { Commit } else { Abort });
            }
            Action::Levels(leader, at) => {
                let to_commit = state.participants[leader].leads == Some(Commit);
                state.participants[at].status = if to_commit { Status::PreCommitted } else { Status::Prepared };
            }
            Action::Ends(leader, at) => {
                if let Some(decision) = state.participants[leader].leads {
                    state.participants[at].status = decision.end();
                }
            }
            Action::CoordinatorLooks => state.coordinator_looks(),
            Action::Consults(at) => state.consults(at),
            Action::ReadyLands => state.store.ready |= state.store.decision.is_none(),
            Action::DecisionLands(decision) => state.decision_lands(decision),
        }
    }

    fn choose(&self, state: &mut State<N>, decision: Decision) {
        if self.rule == Rule::Record {
            state.send(decision);
            state.coordinator = Coordinator::Deciding(decision);
        } else {
            state.said = Some(decision);
            state.coordinator = Coordinator::Telling(decision);
        }
    }
}

impl<const N: usize> State<N> {
    /// Silence is trusted to be death, unless there is a partition.
    fn is_timed_out(&self, p: &Participant) -> bool {
        p.far || (self.coordinator == Coordinator::Dead && !p.has_mail())
    }

    fn of_backup(&self, at: usize, actions: &mut Vec<Action>) {
        let me = &self.participants[at];
        let reached = || self.participants.iter().enumerate().filter(|(_, p)| !p.dead && p.far == me.far);
        let Some(decision) = me.leads else {
            // What was sent before has arrived everywhere, and there is one at a time.
            if me.is_in_doubt() && reached().all(|(_, p)| p.leads.is_none() && self.is_timed_out(p)) {
                actions.push(Action::Leads(at));
            }
            return;
        };
        // Whoever crashes in between, the next one comes to the same end.
        let others = reached().filter(|(_, p)| !p.is_level(decision) && p.is_in_doubt());
        actions.extend(others.map(|(other, _)| Action::Levels(at, other)));
        if reached().all(|(_, p)| p.is_level(decision) || p.is_at_end()) {
            actions.extend(reached().filter(|(_, p)| !p.is_at_end()).map(|(other, _)| Action::Ends(at, other)));
        }
    }

    fn tell(&mut self, at: usize) {
        let p = &mut self.participants[at];
        match self.coordinator {
            Coordinator::PreCommitting if !p.is_silent() => (p.told, p.pre_commit) = (1, true),
            Coordinator::Telling(decision) if !p.is_silent() => (p.told, p.outcome) = (2, Some(decision)),
            _ => {}
        }
    }

    fn send(&mut self, decision: Decision) {
        match decision {
            Commit => self.store.sent_commit = true,
            Abort => self.store.sent_abort = true,
        }
    }

    /// One step at the store.
    fn decision_lands(&mut self, decision: Decision) {
        if self.store.decision.is_none() && (decision == Commit || !self.store.ready) {
            self.store.decision = Some(decision);
        }
    }

    fn coordinator_looks(&mut self) {
        match (self.coordinator, self.store.decision) {
            (_, Some(decision)) => {
                self.said = Some(decision);
                self.coordinator = Coordinator::Telling(decision);
            }
            (Coordinator::Recording, None) if self.store.ready => self.coordinator = Coordinator::PreCommitting,
            // Its abort was refused, because all have voted yes.
            (Coordinator::Deciding(Abort), None) if self.store.ready => {
                self.send(Commit);
                self.coordinator = Coordinator::Deciding(Commit);
            }
            _ => {}
        }
    }

    fn consults(&mut self, at: usize) {
        match self.store.decision {
            Some(decision) => self.participants[at].status = decision.end(),
            None if self.store.ready => self.send(Commit),
            None => self.send(Abort),
        }
    }
}

impl Participant {
    fn says(&self) -> u8 {
        match self.status {
            Status::Working | Status::Aborted => 0,
            Status::Prepared => 1,
            Status::PreCommitted | Status::Committed => 2,
        }
    }

    fn is_silent(&self) -> bool {
        self.dead || self.far
    }

    fn is_in_doubt(&self) -> bool {
        matches!(self.status, Status::Prepared | Status::PreCommitted)
    }

    fn has_mail(&self) -> bool {
        self.pre_commit || self.outcome.is_some()
    }

    fn is_level(&self, decision: Decision) -> bool {
        match decision {
            Commit => matches!(self.status, Status::PreCommitted | Status::Committed),
            Abort => matches!(self.status, Status::Working | Status::Prepared | Status::Aborted),
        }
    }

    fn deliver(&mut self) {
        if std::mem::take(&mut self.pre_commit) {
            if self.status == Status::Prepared {
                self.status = Status::PreCommitted;
            }
        } else if let Some(decision) = self.outcome.take().filter(|_| !self.is_at_end()) {
            self.status = decision.end();
        }
    }
}

impl Decision {
    fn end(self) -> Status {
        match self {
            Commit => Status::Committed,
            Abort => Status::Aborted,
        }
    }
}
