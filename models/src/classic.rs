//! Textbook two-phase commit, after the TLA+ specification in Gray and Lamport, "Consensus on Transaction Commit" (2006).
//!
//! Promise: its number of states is the one others have counted, 288 with three participants and 8,832 with five. That
//! says that the checker visits all of them, and none twice.

use stateright::{Model, Property, Representative};

/// Two-phase commit with so many participants, a coordinator that never fails, and messages that are never consumed.
#[derive(Debug, Clone)]
pub struct Classic {
    /// How many.
    pub participants: usize,
}

/// Where a participant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// It may still do as it likes.
    Working,
    /// It waits for the outcome.
    Prepared,
    /// The end.
    Committed,
    /// The end.
    Aborted,
}

/// A participant, and what the coordinator has of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Participant {
    /// Where it is.
    pub status: Status,
    /// It has said so; the message stays.
    pub says_prepared: bool,
    /// The coordinator has heard it.
    pub heard: bool,
}

/// A state: the coordinator's decision is at the same time the message that tells it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// All participants.
    pub participants: Vec<Participant>,
    /// The outcome, once there is one.
    pub told: Option<crate::Decision>,
}

/// A step of one participant, or of the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The participant prepares and says so.
    Prepare(usize),
    /// The participant gives up before it has prepared.
    GiveUp(usize),
    /// The coordinator hears that the participant has prepared.
    Hear(usize),
    /// The coordinator decides.
    Decide(crate::Decision),
    /// The participant hears the outcome.
    Finish(usize),
}

impl Model for Classic {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let fresh = Participant { status: Status::Working, says_prepared: false, heard: false };
        vec![State { participants: vec![fresh; self.participants], told: None }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        use crate::Decision::{Abort, Commit};
        if state.told.is_none() {
            actions.push(Action::Decide(Abort));
            if state.participants.iter().all(|p| p.heard) {
                actions.push(Action::Decide(Commit));
            }
        }
        for (at, p) in state.participants.iter().enumerate() {
            if p.status == Status::Working {
                actions.extend([Action::Prepare(at), Action::GiveUp(at)]);
            }
            if state.told.is_none() && p.says_prepared {
                actions.push(Action::Hear(at));
            }
            if state.told.is_some() {
                actions.push(Action::Finish(at));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let all = &mut state.participants;
        match action {
            Action::Prepare(at) => {
                all[at].status = Status::Prepared;
                all[at].says_prepared = true;
            }
            Action::GiveUp(at) => all[at].status = Status::Aborted,
            Action::Hear(at) => all[at].heard = true,
            Action::Decide(decision) => state.told = Some(decision),
            Action::Finish(at) => {
                all[at].status = match last.told? {
                    crate::Decision::Commit => Status::Committed,
                    crate::Decision::Abort => Status::Aborted,
                }
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("P27 no participant commits while another aborts", |_, s: &State| {
                !(s.any(Status::Committed) && s.any(Status::Aborted))
            }),
            Property::sometimes("P28 commit is reached", |_, s: &State| s.all(Status::Committed)),
            Property::sometimes("P28 abort is reached", |_, s: &State| s.all(Status::Aborted)),
        ]
    }
}

impl State {
    fn any(&self, status: Status) -> bool {
        self.participants.iter().any(|p| p.status == status)
    }

    fn all(&self, status: Status) -> bool {
        self.participants.iter().all(|p| p.status == status)
    }
}

/// The names of participants do not matter.
impl Representative for State {
    fn representative(&self) -> Self {
        let mut state = self.clone();
        state.participants.sort_unstable();
        state
    }
}
