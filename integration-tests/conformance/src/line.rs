//! Lines: order is arrival, and everybody agrees on it.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use quorate_core::{Enqueue, Nonce, Place, Revision, TicketKind};

use crate::{
    Clients,
    support::{Actor, actor, actors, cases, dir, eventually, keep, line, spawn},
};

cases!("line":
    order_is_arrival_and_tokens_rise_with_it,
    an_unused_line_is_empty,
    ahead_is_empty_exactly_for_the_first,
    look_names_at_least_the_nearest_in_order,
    the_front_shows_its_token_and_value,
    lines_do_not_mix,
    tokens_rise_over_an_emptied_line,
    leaving_the_front_lets_the_next_be_first,
    leaving_from_the_middle_keeps_the_order,
    kinds_are_kept,
    when_free_joins_an_empty_line,
    when_free_takes_no_place_behind_a_holder,
    when_free_has_one_winner,
    concurrent_arrivals_agree_on_one_order,
    the_last_of_two_hundred_knows_its_neighbour,
);

async fn order_is_arrival_and_tokens_rise_with_it(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 3] = actors(&clients).await;
    let mut places: Vec<Place> = Vec::new();
    for round in 0..3 {
        for actor in &crowd {
            let place = actor.enqueue(&Enqueue { depth: 100, ..actor.entry(&line("x")) }).await;
            let ahead: Vec<_> = places.iter().rev().map(|p| p.ticket.clone()).collect();
            assert_eq!(place.ahead, ahead, "round {round}: everybody who came before stands ahead, nearest first");
            assert!(places.last().is_none_or(|last| last.token < place.token), "round {round}");
            places.push(place);
        }
    }
    let order: Vec<_> = places.iter().map(|p| p.ticket.clone()).collect();
    for actor in &crowd {
        eventually("every client sees the whole line in order", || async { actor.tickets(&line("x")).await == order })
            .await;
    }
}

async fn an_unused_line_is_empty(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for _ in 0..2 {
        let listed = a.backend.line(&line("x")).await.expect("a line can be listed");
        assert_eq!((listed.tickets, listed.front), (vec![], None));
        let place = a.join(&line("x")).await;
        a.leave(&place.ticket).await;
    }
}

async fn ahead_is_empty_exactly_for_the_first(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    for depth in [0, 1, 2, usize::MAX] {
        let line = line(&depth.to_string());
        let first = a.enqueue(&Enqueue { depth, ..a.entry(&line) }).await;
        assert_eq!(first.ahead, [], "depth {depth}");
        for behind in 1..4 {
            let place = a.enqueue(&Enqueue { depth, ..a.entry(&line) }).await;
            assert!(!place.ahead.is_empty(), "depth {depth}, {behind} behind: who is not first must see that");
            assert!(!a.look(&place.ticket, depth).await.ahead.is_empty(), "depth {depth}, {behind} behind");
        }
        assert_eq!(a.look(&first.ticket, depth).await.ahead, [], "depth {depth}");
    }
}

async fn look_names_at_least_the_nearest_in_order(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let mut places = Vec::new();
    for _ in 0..6 {
        places.push(a.join(&line("x")).await);
    }
    for (i, place) in places.iter().enumerate() {
        let expected: Vec<_> = places[..i].iter().rev().map(|p| &p.ticket).collect();
        for depth in [1, 2, 3, 10] {
            let looked = a.look(&place.ticket, depth).await;
            assert_eq!(looked.token, place.token, "the token of a ticket never changes");
            assert!(looked.ahead.len() >= depth.min(i), "place {i}, depth {depth}: {:?}", looked.ahead);
            assert!(looked.ahead.iter().eq(expected.iter().copied().take(looked.ahead.len())), "place {i}: {looked:?}");
        }
    }
}

async fn the_front_shows_its_token_and_value(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let value = |text: &'static str| Enqueue { value: Bytes::from_static(text.as_bytes()), ..a.entry(&line("x")) };
    let first = a.enqueue(&value("first, {\"host\": \"ä\"}")).await;
    let second = a.enqueue(&value("second")).await;
    for (place, text) in [(first, "first, {\"host\": \"ä\"}"), (second, "second")] {
        let front = a.backend.line(&line("x")).await.expect("a line can be listed").front.expect("somebody is first");
        assert_eq!((front.token, &front.value[..]), (place.token, text.as_bytes()));
        a.leave(&place.ticket).await;
    }
}

async fn lines_do_not_mix(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let lines = [line("x"), line("x2"), line("X"), line("x/y"), dir("lock2")];
    let mut places = Vec::new();
    for line in &lines {
        let first = a.join(line).await;
        assert_eq!(first.ahead, [], "{line}");
        let second = a.join(line).await;
        assert_eq!(second.ahead, [first.ticket.clone()], "{line}");
        places.push([first.ticket, second.ticket]);
    }
    for (line, tickets) in lines.iter().zip(&places) {
        assert_eq!(a.tickets(line).await, tickets, "{line}");
    }
}

async fn tokens_rise_over_an_emptied_line(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 2] = actors(&clients).await;
    let mut last = Revision(0);
    for round in 0..10 {
        let actor = &crowd[round % 2];
        let place = actor.join(&line("x")).await;
        assert_eq!(place.ahead, [], "round {round}");
        assert!(place.token > last, "round {round}: {} after {last}", place.token);
        last = place.token;
        actor.leave(&place.ticket).await;
    }
    // Also if the line ends with its only lease.
    let lease = keep(&crowd[0].backend).await;
    let place = crowd[0].enqueue(&Enqueue { lease: lease.id.clone(), ..crowd[0].entry(&line("x")) }).await;
    assert!(place.token > last);
    crowd[0].backend.revoke(&lease.id).await.expect("revoking works");
    assert!(crowd[1].join(&line("x")).await.token > place.token);
}

async fn leaving_the_front_lets_the_next_be_first(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let (first, second) = (a.join(&line("x")).await, b.join(&line("x")).await);
    assert_eq!(second.ahead, [first.ticket.clone()]);
    a.leave(&first.ticket).await;
    eventually("the second is first", || async { b.look(&second.ticket, 1).await.ahead.is_empty() }).await;
    let third = a.join(&line("x")).await;
    assert_eq!(third.ahead, [second.ticket], "who left comes back at the end");
    assert_ne!(third.ticket.name, first.ticket.name, "names are never used twice");
}

async fn leaving_from_the_middle_keeps_the_order(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let mut places = Vec::new();
    for _ in 0..6 {
        places.push(a.join(&line("x")).await);
    }
    for leaver in [2, 3, 1, 4] {
        a.leave(&places[leaver].ticket).await;
        places[leaver].ahead.clear();
        let looked = a.backend.look(&places[leaver].ticket, 1).await.expect("looking works");
        assert_eq!(looked, None);
    }
    assert_eq!(a.look(&places[5].ticket, 9).await.ahead, [places[0].ticket.clone()]);
    assert_eq!(a.tickets(&line("x")).await, [places[0].ticket.clone(), places[5].ticket.clone()]);
    a.leave(&places[0].ticket).await;
    assert_eq!(a.look(&places[5].ticket, 9).await.ahead, []);
}

async fn kinds_are_kept(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let kinds = [TicketKind::Read, TicketKind::Read, TicketKind::Write, TicketKind::Read, TicketKind::Write];
    let mut tickets = Vec::new();
    for (i, kind) in kinds.into_iter().enumerate() {
        let actor = if i % 2 == 0 { &a } else { &b };
        tickets.push(actor.enqueue(&Enqueue { kind, ..actor.entry(&line("x")) }).await.ticket);
    }
    eventually("the other client sees the line", || async { b.tickets(&line("x")).await == tickets }).await;
    let mut ahead = a.look(&tickets[4], 10).await.ahead;
    ahead.reverse();
    assert_eq!(ahead, tickets[..4], "kinds come back with the tickets");
    assert_eq!(tickets.iter().map(|t| t.kind).collect::<Vec<_>>(), kinds);
}

async fn when_free_joins_an_empty_line(clients: Arc<dyn Clients>) {
    let a = actor(&clients).await;
    let entry = Enqueue { when_free: true, ..a.entry(&line("x")) };
    let place = a.enqueue(&entry).await;
    assert_eq!(place.ahead, []);
    assert_eq!(a.enqueue(&entry).await, place, "repeating it gives the same place, not a refusal by oneself");
    a.leave(&place.ticket).await;
    let again = a.enqueue(&Enqueue { nonce: Nonce::random(), ..entry }).await;
    assert!(again.ahead.is_empty() && again.token > place.token, "an emptied line is free");
}

async fn when_free_takes_no_place_behind_a_holder(clients: Arc<dyn Clients>) {
    let [a, b]: [Actor; 2] = actors(&clients).await;
    let held = a.join(&line("x")).await;
    for actor in [&a, &b] {
        let entry = Enqueue { when_free: true, ..actor.entry(&line("x")) };
        let answer = actor.backend.enqueue(&entry).await.expect("trying works");
        // A backend that cannot ask this in one step joins; its caller leaves.
        if let Some(place) = answer {
            assert_eq!(place.ahead, [held.ticket.clone()]);
            actor.leave(&place.ticket).await;
        }
        assert_eq!(actor.tickets(&line("x")).await, [held.ticket.clone()], "a refused try leaves nothing");
    }
    a.leave(&held.ticket).await;
    assert_eq!(b.enqueue(&Enqueue { when_free: true, ..b.entry(&line("x")) }).await.ahead, []);
}

async fn when_free_has_one_winner(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 4] = actors(&clients).await;
    for round in 0..5 {
        let line = line(&round.to_string());
        let answers = join_all((0..20).map(|i| {
            let actor = &crowd[i % crowd.len()];
            let entry = Enqueue { when_free: true, ..actor.entry(&line) };
            async move { actor.backend.enqueue(&entry).await.expect("trying works") }
        }))
        .await;
        let first: Vec<_> = answers.iter().flatten().filter(|p| p.ahead.is_empty()).collect();
        assert_eq!(first.len(), 1, "round {round}: {first:?}");
        for place in answers.iter().flatten().filter(|p| !p.ahead.is_empty()) {
            crowd[0].leave(&place.ticket).await;
        }
        assert_eq!(crowd[0].tickets(&line).await, [first[0].ticket.clone()], "round {round}");
    }
}

async fn concurrent_arrivals_agree_on_one_order(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 4] = actors(&clients).await;
    let mut tasks: Vec<_> = (0..64)
        .map(|i| {
            let actor = &crowd[i % crowd.len()];
            let (backend, entry) = (actor.backend.clone(), Enqueue { depth: 100, ..actor.entry(&line("x")) });
            spawn(async move { backend.enqueue(&entry).await.expect("joining works").expect("a place") })
        })
        .collect();
    let mut places = Vec::new();
    for task in &mut tasks {
        places.push(task.soon("joining").await);
    }
    places.sort_by_key(|p| p.token);
    assert!(places.windows(2).all(|p| p[0].token < p[1].token), "every ticket has a token of its own");
    for (i, place) in places.iter().enumerate() {
        let ahead: Vec<_> = places[..i].iter().rev().map(|p| p.ticket.clone()).collect();
        assert_eq!(place.ahead, ahead, "place {i} was told who has a smaller token, nearest first");
    }
    let order: Vec<_> = places.iter().map(|p| p.ticket.clone()).collect();
    for actor in &crowd {
        eventually("every client sees that order", || async { actor.tickets(&line("x")).await == order }).await;
    }
}

async fn the_last_of_two_hundred_knows_its_neighbour(clients: Arc<dyn Clients>) {
    let crowd: [Actor; 2] = actors(&clients).await;
    let mut places = Vec::new();
    for i in 0..200 {
        let place = crowd[i % 2].join(&line("x")).await;
        assert_eq!(place.ahead.first(), places.last().map(|p: &Place| &p.ticket), "arrival {i}");
        places.push(place);
    }
    let last = &places[199];
    for neighbour in (195..199).rev() {
        let actor = &crowd[neighbour % 2];
        assert_eq!(actor.look(&last.ticket, 1).await.ahead.first(), Some(&places[neighbour].ticket));
        actor.leave(&places[neighbour].ticket).await;
        eventually("the next nearest is the neighbour", || async {
            crowd[1].look(&last.ticket, 1).await.ahead.first() == Some(&places[neighbour - 1].ticket)
        })
        .await;
    }
    eventually("four have left", || async { crowd[0].tickets(&line("x")).await.len() == 196 }).await;
}
