//! The automaton of a peer's states, against which every event of a monitor is checked.
//!
//! Promise: an event that is no change of state, that goes back to an older incarnation, or that leaves out a step is
//! found; a stream without such events passes.

use std::collections::HashMap;

use quorate_core::heartbeat::{Incarnation, PeerEvent};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not known, or gone.
    Absent,
    Alive,
    Suspect,
    Dead,
}

/// What has been told of each peer so far.
#[derive(Debug, Default)]
pub(super) struct Lawful(HashMap<String, (State, Option<Incarnation>)>);

/// Whom the event is about.
pub(super) fn subject(event: &PeerEvent) -> Option<&str> {
    match event {
        PeerEvent::Alive { peer, .. }
        | PeerEvent::Suspect { peer, .. }
        | PeerEvent::Dead { peer, .. }
        | PeerEvent::Returned { peer, .. }
        | PeerEvent::Left { peer, .. } => Some(peer),
        _ => None,
    }
}

impl Lawful {
    /// Panics if the event may not follow those before it.
    pub(super) fn check(&mut self, event: &PeerEvent) {
        use State::{Absent, Alive, Dead, Suspect};
        let (next, incarnation) = match event {
            PeerEvent::Alive { incarnation, .. } | PeerEvent::Returned { incarnation, .. } => (Alive, incarnation),
            PeerEvent::Suspect { incarnation, .. } => (Suspect, incarnation),
            PeerEvent::Dead { incarnation, .. } => (Dead, incarnation),
            PeerEvent::Left { incarnation, .. } => (Absent, incarnation),
            // Nothing is known any more of anybody.
            _ => return self.0.clear(),
        };
        let peer = subject(event).expect("all of these name a peer");
        let (before, last) = self.0.get(peer).copied().unwrap_or((Absent, None));
        let lawful = match (before, event) {
            (Absent | Suspect, PeerEvent::Alive { .. })
            // What stood before the monitor came may be silent, or gone, before it was ever heard.
            | (Absent | Alive, PeerEvent::Suspect { .. })
            | (Absent | Alive | Suspect, PeerEvent::Dead { .. } | PeerEvent::Left { .. }) => true,
            (Dead, PeerEvent::Returned { before, .. }) => Some(*before) == last,
            _ => false,
        };
        // A dead record that was forgotten may be followed by a new one of the same name.
        let anew = before == Dead && matches!(event, PeerEvent::Alive { .. }) && Some(*incarnation) > last;
        assert!(lawful || anew, "{event:?} may not follow {before:?}");
        let run = Some(*incarnation);
        let right = match before {
            Absent => run > last,
            Dead => run >= last,
            Alive | Suspect => run == last,
        };
        assert!(right, "{event:?} is about another run than {last:?}");
        self.0.insert(peer.to_owned(), (next, Some(*incarnation)));
    }
}

#[cfg(test)]
mod tests {
    use quorate_core::{Revision, heartbeat::Cause};

    use super::*;

    /// `+1` alive, `?1` suspect, `!1` dead, `^2<1` returned, `-1` left.
    fn stream(text: &str) -> Vec<PeerEvent> {
        let run = |text: &str| Incarnation::from(Revision(text.parse().expect("a number")));
        let event = |word: &str| {
            let (kind, rest) = word.split_at(1);
            let (incarnation, before) = rest.split_once('<').map_or((rest, rest), |pair| pair);
            let (peer, incarnation, before) = ("a".to_owned(), run(incarnation), run(before));
            match kind {
                "+" => PeerEvent::Alive { peer, incarnation },
                "?" => PeerEvent::Suspect { peer, incarnation, suspicion: 8.0 },
                "!" => PeerEvent::Dead { peer, incarnation, cause: Cause::Silence },
                "^" => PeerEvent::Returned { peer, incarnation, before },
                "-" => PeerEvent::Left { peer, incarnation },
                other => panic!("no such kind: {other}"),
            }
        };
        text.split(' ').map(event).collect()
    }

    fn is_lawful(text: &str) -> bool {
        let events = stream(text);
        let check = move || {
            let mut lawful = Lawful::default();
            events.iter().for_each(|event| lawful.check(event));
        };
        std::panic::catch_unwind(check).is_ok()
    }

    #[test]
    fn what_may_happen_passes_and_each_planted_violation_is_found() {
        for good in ["+1 ?1 +1 ?1 !1 ^1<1 -1", "+1 !1 ^2<1 ?2 !2 ^5<2", "?1 !1 +2", "+1 -1 +2 -2", "!3 ^4<3", "-1"] {
            assert!(is_lawful(good), "{good}");
        }
        for bad in [
            "+1 +1",
            "+1 ?1 ?1",
            "+1 ?1 !1 !1",
            "+1 ^1<1",
            "+1 !1 +1",
            "+1 !1 ^2<2",
            "+1 !1 -1",
            "+1 !1 ?1",
            "+2 ?2 +1",
            "+1 ?2",
            "+1 -1 -1",
            "+2 -2 +1",
            "+5 !5 ^4<5",
        ] {
            assert!(!is_lawful(bad), "{bad}");
        }
    }
}
