//! Atomic commit with a decision record, in every state that three participants, a driver and two recoverers can be in.

use quorate_models::{
    Decision,
    decision_record::{Action, DecisionRecord, Driver, Flaw, State, Status},
    graph::Graph,
};
use stateright::{Checker, HasDiscoveries, Model};

const STABLE: &str = "P26 a branch that has ended stays as it is";
const CONSISTENT: &str = "P27 no participant commits while another aborts";
const NEVER_BOTH: &str = "P27 nobody is told both";
const VALID: &str = "P28 commit is decided only if all are in favour";
const IN_DOUBT: &str = "P30 nobody prepared ends undecided";
const LATE: &str = "P30 a prepare that comes late is refused";
const READY: &str = "P32 what all are in favour of is not aborted";
const ONE_DECISION: &str = "P33 there is one decision";
const OVER: &str = "P33 nothing is decided that is over";

fn model(recoverers: usize) -> DecisionRecord<3> {
    DecisionRecord { recoverers, ..DecisionRecord::default() }
}

fn three_phase(flaw: Option<Flaw>) -> DecisionRecord<3> {
    DecisionRecord { recoverers: 1, operator: false, pre_commits: true, flaw }
}

#[test]
fn every_property_holds_in_every_state() {
    // Not only that nothing is found: also that as much is visited as when this was written.
    for (recoverers, states) in [(0, 754), (1, 94_078), (2, 367_387)] {
        let checker = model(recoverers).checker().spawn_bfs().join();
        println!("{recoverers} recoverers: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
        checker.assert_properties();
        assert_eq!(checker.unique_state_count(), states);
    }
}

#[test]
fn every_property_holds_when_an_operator_decides_by_hand() {
    let model = DecisionRecord::<3> { recoverers: 1, operator: true, ..DecisionRecord::default() };
    let checker = model.checker().spawn_bfs().join();
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), 213_018);
}

/// The driver may find its transaction forgotten that was committed, although it has decided nothing itself.
#[test]
fn a_driver_looks_for_a_decision_by_hand_before_it_takes_the_end_for_an_abort() {
    for flaw in [Flaw::OverMeansAborted, Flaw::AcknowledgesEarly] {
        let model = DecisionRecord::<3> { recoverers: 1, operator: true, pre_commits: false, flaw: Some(flaw) };
        let found = HasDiscoveries::AnyOf([NEVER_BOTH].into());
        let way = model.checker().finish_when(found).spawn_bfs().join().assert_any_discovery(NEVER_BOTH).into_actions();
        assert!(way.contains(&Action::OperatorDecides(Decision::Commit)), "{way:#?}");
    }
}

#[test]
fn every_property_holds_with_three_phases() {
    for (recoverers, operator, states) in [(1, false, 126_370), (2, false, 505_809), (1, true, 292_544)] {
        let model = DecisionRecord::<3> { recoverers, operator, pre_commits: true, flaw: None };
        let checker = model.checker().spawn_bfs().join();
        println!("three phases, {recoverers} recoverers, operator {operator}: {} states", checker.unique_state_count());
        checker.assert_properties();
        assert_eq!(checker.unique_state_count(), states);
    }
}

/// What the third phase is for: a driver that dies after the votes does not take the commit with it.
#[test]
fn what_all_are_in_favour_of_is_committed_by_a_recoverer_p32() {
    let committed = |s: &State<3>| s.is_settled() && !s.any(Status::Aborted) && !s.any(Status::Refused);
    let graph = Graph::of(&three_phase(None), Action::recovers);
    let stuck = graph.stuck(|s| s.is_recovered() && s.ready, committed);
    assert!(stuck.is_none(), "{stuck:#?}");
    let stuck = graph.stuck(State::is_recovered, State::is_settled);
    assert!(stuck.is_none(), "{stuck:#?}");
}

#[test]
fn an_abort_looks_whether_all_are_in_favour_p32() {
    let found = HasDiscoveries::AnyOf([READY].into());
    let checker = three_phase(Some(Flaw::AbortsTheReady)).checker().finish_when(found).spawn_bfs().join();
    println!("{:?}", checker.assert_any_discovery(READY).into_actions());
}

#[test]
fn who_has_found_all_in_favour_does_not_take_the_end_for_an_abort() {
    let found = HasDiscoveries::AnyOf([NEVER_BOTH].into());
    let checker = three_phase(Some(Flaw::OverMeansAborted)).checker().finish_when(found).spawn_bfs().join();
    println!("{:?}", checker.assert_any_discovery(NEVER_BOTH).into_actions());
}

#[test]
fn that_all_are_in_favour_is_not_written_after_the_end() {
    let graph = Graph::of(&three_phase(Some(Flaw::ReadyUnchecked)), Action::recovers);
    let (way, state) = graph.stuck(State::is_recovered, State::is_settled).expect("it stays for ever");
    println!("{state:?} after {way:?}");
}

#[test]
fn one_recoverer_that_lives_can_finish_whatever_was_left_p29() {
    for recoverers in [1, 2] {
        let graph = Graph::of(&model(recoverers), Action::recovers);
        let stuck = graph.stuck(State::is_recovered, State::is_settled);
        assert!(stuck.is_none(), "{stuck:#?}");
    }
}

#[test]
fn without_recoverers_a_dead_driver_leaves_the_prepared_in_doubt_p31() {
    let in_doubt = |s: &State<3>| s.driver == Driver::Gone && s.branches.iter().all(|b| b.status == Status::Prepared);
    let anything = |_: &Action| true;
    let graph = Graph::of(&model(0), anything);
    let (way, _) = graph.stuck(in_doubt, State::is_settled).expect("it blocks");
    assert!(way.contains(&Action::DriverCrashes), "{way:#?}");
}

/// The checker finds that the flaw breaks the property, and tells how.
fn breaks(flaw: Flaw, property: &'static str) {
    let model = DecisionRecord::<3> { recoverers: 2, flaw: Some(flaw), ..DecisionRecord::default() };
    let found = HasDiscoveries::AnyOf([property].into());
    let way = model.checker().finish_when(found).spawn_bfs().join().assert_any_discovery(property);
    println!("{flaw:?} breaks {property:?} in these steps: {:#?}", way.into_actions());
}

/// The checker finds a state from which no recoverer leads to the end.
fn sticks(flaw: Flaw) {
    // One of them: the states are fewer, and what one can finish is what is promised.
    let graph = Graph::of(
        &DecisionRecord::<3> { recoverers: 1, flaw: Some(flaw), ..DecisionRecord::default() },
        Action::recovers,
    );
    let (way, state) = graph.stuck(State::is_recovered, State::is_settled).expect("it gets stuck");
    println!("{flaw:?} leaves this for ever: {state:?}, after these steps: {way:#?}");
}

#[test]
fn a_decision_without_a_look_at_the_transaction_comes_after_the_end() {
    breaks(Flaw::DecidesUnchecked, ONE_DECISION);
    breaks(Flaw::DecidesUnchecked, OVER);
    sticks(Flaw::DecidesUnchecked);
}

#[test]
fn forgetting_before_all_have_confirmed_splits_the_transaction() {
    breaks(Flaw::ForgetsEarly, CONSISTENT);
}

#[test]
fn a_recoverer_must_not_commit_by_what_it_sees_of_the_votes() {
    breaks(Flaw::RecovererGuesses, VALID);
    breaks(Flaw::RecovererGuesses, CONSISTENT);
}

#[test]
fn a_driver_must_not_decide_in_memory() {
    breaks(Flaw::DriverDecidesAlone, CONSISTENT);
    breaks(Flaw::DriverDecidesAlone, NEVER_BOTH);
}

#[test]
fn without_tombstones_a_late_prepare_leaves_an_orphan() {
    breaks(Flaw::NoTombstonesNoLook, LATE);
    breaks(Flaw::NoTombstonesNoLook, STABLE);
    sticks(Flaw::NoTombstonesNoLook);
}

#[test]
fn a_look_for_what_came_late_removes_the_orphan() {
    breaks(Flaw::NoTombstones, LATE);
    let graph = Graph::of(
        &DecisionRecord::<3> { recoverers: 1, flaw: Some(Flaw::NoTombstones), ..DecisionRecord::default() },
        Action::recovers,
    );
    let stuck = graph.stuck(State::is_recovered, |s: &State<3>| s.is_settled());
    assert!(stuck.is_none(), "{stuck:#?}");
}

#[test]
fn a_look_for_what_came_late_asks_the_participant_twice() {
    breaks(Flaw::LooksOnce, NEVER_BOTH);
}

#[test]
fn a_prepared_participant_must_not_abort_by_itself() {
    breaks(Flaw::TimesOutAlone, IN_DOUBT);
    breaks(Flaw::TimesOutAlone, CONSISTENT);
}

#[test]
fn nobody_is_asked_to_prepare_before_the_transaction_is_in_the_log() {
    breaks(Flaw::PreparesBeforeBegun, CONSISTENT);
}

#[test]
fn a_begin_is_never_sent_again() {
    breaks(Flaw::BeginsAgain, ONE_DECISION);
}
