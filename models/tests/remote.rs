//! Participants that are reached through the store, in every state of a driver, a recoverer and two of them.

use quorate_models::{
    graph::Graph,
    remote::{Action, Flaw, Remote, State},
};
use stateright::{Checker, HasDiscoveries, Model};

const CONSISTENT: &str = "P27 no participant commits while another aborts";

fn holds<const N: usize>(piecemeal: bool, states: usize) {
    let checker = Remote::<N> { piecemeal, flaw: None }.checker().spawn_bfs().join();
    println!("piecemeal {piecemeal}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), states, "piecemeal: {piecemeal}");
}

#[test]
fn every_property_holds_in_every_state() {
    holds::<2>(false, 312_782);
    holds::<2>(true, 280_882);
}

#[test]
#[ignore = "28 million states: minutes, and much memory"]
fn every_property_holds_in_every_state_with_three() {
    holds::<3>(false, 14_963_970);
    holds::<3>(true, 13_032_100);
}

#[test]
fn recoverer_and_servers_finish_whatever_was_left_and_leave_no_record_p29() {
    for piecemeal in [false, true] {
        let graph = Graph::of(&Remote::<2> { piecemeal, flaw: None }, Action::recovers);
        let stuck = graph.stuck(|_| true, State::is_settled);
        assert!(stuck.is_none(), "piecemeal {piecemeal}: {stuck:#?}");
    }
}

/// The checker finds a state from which nobody leads to the end, or whose records nobody takes away.
fn sticks(flaw: Flaw, piecemeal: bool) {
    let graph = Graph::of(&Remote::<2> { piecemeal, flaw: Some(flaw) }, Action::recovers);
    let (way, state) = graph.stuck(|_| true, State::is_settled).expect("it gets stuck");
    println!("{flaw:?} leaves this for ever: {state:?}, after {way:?}");
}

#[test]
fn a_vote_after_the_work_record_has_changed_would_stay_for_ever() {
    sticks(Flaw::VotesUnchecked, false);
}

#[test]
fn work_that_is_given_after_the_decision_would_stay_for_ever() {
    sticks(Flaw::GivesWorkAfterDecision, true);
}

#[test]
fn an_outcome_put_where_it_was_confirmed_would_stay_for_ever() {
    sticks(Flaw::TellsTheConfirmed, true);
}

#[test]
fn a_commit_forgotten_while_work_records_stand_splits_the_transaction() {
    let model = Remote::<2> { piecemeal: false, flaw: Some(Flaw::ForgetsEarly) };
    let found = HasDiscoveries::AnyOf([CONSISTENT].into());
    let way = model.checker().finish_when(found).spawn_bfs().join().assert_any_discovery(CONSISTENT);
    println!("it splits by {:?}", way.into_actions());
}
