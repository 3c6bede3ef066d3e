//! Flaws of a backend that the cases about elections must notice, each by itself.

use crate::flawed::Flaw::{self, *};

pub(crate) const PLANTED_UNDER_ELECTIONS: &[(Flaw, &[&str])] = &[
    (NobodyIsEverAhead, &["twenty_candidates_lead_once_each_and_terms_never_go_back"]),
    (LastComeFirstServed, &["rotation_visits_every_candidate"]),
    (TokensFall, &["twenty_candidates_lead_once_each_and_terms_never_go_back"]),
    (StandingIsNotChecked, &["a_fenced_write_of_a_former_leader_is_refused"]),
    (
        ChecksAreIgnored,
        &[
            "an_announcement_that_lands_late_changes_nothing",
            "a_resignation_that_lands_late_does_not_touch_the_next_leader",
            "a_leadership_is_ended_by_its_fence_from_elsewhere",
        ],
    ),
    (LeavingTakesTheFront, &["a_dropped_wait_for_leadership_leaves_nothing"]),
    (FrontsHaveNoValue, &["the_leader_and_the_candidates_are_known_until_nobody_stands"]),
    (LinesFoldCase, &["hostile_election_names_never_collide"]),
    (NamesFoldCase, &["hostile_election_names_never_collide"]),
    (LeasesNeverEnd, &["a_dead_leader_is_followed_after_its_ttl_and_observers_see_it"]),
    (LeasesEndEarly, &["a_dead_leader_is_followed_after_its_ttl_and_observers_see_it"]),
    (LeasesShareAName, &["observers_see_each_leader_as_it_changes"]),
    (RevokeDoesNothing, &["observers_see_each_leader_as_it_changes"]),
    (FirstLeaseKeepsTheKey, &["observers_see_each_leader_as_it_changes"]),
    (GoneTicketsStandFirst, &["work_is_cancelled_when_the_leader_is_deposed_and_runs_again_in_a_later_term"]),
    (WaitReturnsAtOnce, &["one_resignation_wakes_one_of_a_hundred_candidates"]),
    (WaitEndsOnlyByTimer, &["observers_see_each_leader_as_it_changes"]),
    (WatchMissesDeletions, &["observers_see_each_leader_as_it_changes"]),
    (WatchKeepsTheLastChange, &["a_fresh_observer_sees_the_leader_and_its_announcements_in_order"]),
    (WatchTellsOfNeighbours, &["elections_of_other_names_are_independent"]),
    (ReadsAreOld, &["announcing_replaces_the_value_and_keeps_the_term"]),
];
