//! Three-phase commit with three participants: which rule survives which faults, in every state.

use quorate_models::{
    graph::Graph,
    three_phase::{Action, Coordinator, Faults, Rule, State, ThreePhase},
};
use stateright::{Checker, HasDiscoveries, Model};

const CONSISTENT: &str = "P27 no participant commits while another aborts";

fn model(rule: Rule, faults: Faults) -> ThreePhase<3> {
    ThreePhase { rule, faults }
}

/// Visits everything.
fn holds(rule: Rule, faults: Faults, states: usize) {
    let checker = model(rule, faults).checker().spawn_bfs().join();
    println!("{rule:?} under {faults:?}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), states, "{rule:?} under {faults:?}");
}

/// The checker finds a split transaction; the shortest way to one, each step with the state before it.
fn diverges(rule: Rule, faults: Faults) -> Vec<(State<3>, Action)> {
    let found = HasDiscoveries::AnyOf([CONSISTENT].into());
    model(rule, faults).checker().finish_when(found).spawn_bfs().join().assert_any_discovery(CONSISTENT);
    let graph = Graph::of(&model(rule, faults), |_| false);
    let way = graph.first(State::is_split).expect("it was found before");
    println!("{rule:?} under {faults:?} splits: {:?}", way.iter().map(|(_, action)| action).collect::<Vec<_>>());
    way
}

#[test]
fn timeouts_alone_are_safe_while_all_or_none_hear_a_phase() {
    holds(Rule::Alone, Faults::BetweenPhases, 211);
}

#[test]
fn timeouts_alone_diverge_when_the_coordinator_dies_while_it_tells() {
    let way = diverges(Rule::Alone, Faults::Crashes);
    let death = way.iter().find(|(_, action)| *action == Action::CoordinatorDies);
    assert_eq!(death.expect("it is its death").0.coordinator, Coordinator::PreCommitting, "{way:?}");
}

#[test]
fn a_backup_coordinator_keeps_all_together_if_who_is_silent_is_dead() {
    holds(Rule::Termination, Faults::BetweenPhases, 289);
    holds(Rule::Termination, Faults::Crashes, 5_826);
}

/// The limit of three-phase commit: nobody crashes, one partition between pre-commit and commit is enough.
#[test]
fn a_partition_between_pre_commit_and_commit_splits_it_p32() {
    for rule in [Rule::Alone, Rule::Termination] {
        let way = diverges(rule, Faults::Partition);
        let cut = way.iter().find(|(_, action)| matches!(action, Action::Cut(..)));
        assert_eq!(cut.expect("it is cut").0.coordinator, Coordinator::PreCommitting, "{way:?}");
    }
}

#[test]
fn with_a_decision_record_no_partition_and_no_crash_splits_it_p32() {
    holds(Rule::Record, Faults::Crashes, 25_898);
    holds(Rule::Record, Faults::Partition, 71_818);
    holds(Rule::Record, Faults::Both, 1_029_916);
}

#[test]
fn who_lives_comes_to_an_end_without_the_coordinator() {
    let left_alone = |s: &State<3>| s.coordinator == Coordinator::Dead && !s.cut;
    for (rule, faults) in [
        (Rule::Alone, Faults::BetweenPhases),
        (Rule::Termination, Faults::Crashes),
        (Rule::Record, Faults::Crashes),
        (Rule::Record, Faults::Both),
    ] {
        let graph = Graph::of(&model(rule, faults), Action::is_of_participants);
        let stuck = graph.stuck(left_alone, State::is_over);
        assert!(stuck.is_none(), "{rule:?} under {faults:?}: {stuck:#?}");
    }
}

/// The price of the record: who cannot reach the store waits. Under the other rules nobody would, and some would be wrong.
#[test]
fn who_is_cut_off_from_the_store_stays_in_doubt() {
    let graph = Graph::of(&model(Rule::Record, Faults::Partition), Action::is_of_participants);
    let (way, state) = graph.stuck(|s| s.cut, State::is_over).expect("it waits");
    assert!(state.participants.iter().any(|p| p.far != state.store.far && !p.is_at_end()), "{way:?}");
}
