//! The checker against figures of others.

use quorate_models::classic::{Classic, State};
use stateright::{Checker, Model};

#[test]
fn textbook_two_phase_commit_has_as_many_states_as_others_have_counted() {
    for (participants, states) in [(3, 288), (5, 8_832)] {
        let checker = Classic { participants }.checker().spawn_bfs().join();
        checker.assert_properties();
        assert_eq!(checker.unique_state_count(), states, "{participants} participants");
    }
}

#[test]
fn symmetry_visits_one_state_of_each_kind() {
    let five = || Classic { participants: 5 }.checker();
    // Sorted by where they are alone, a kind has several representatives. Others have counted 665 that way.
    let roughly = |state: &State| {
        let mut state = state.clone();
        state.participants.sort_by_key(|p| p.status);
        state
    };
    assert_eq!(five().symmetry_fn(roughly).spawn_dfs().join().unique_state_count(), 665);
    let checker = five().symmetry().spawn_dfs().join();
    checker.assert_properties();
    assert_eq!(checker.unique_state_count(), 314);
}
