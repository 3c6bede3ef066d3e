//! Fairness: order of arrival, one wake-up per release, and leaving from the middle.

use std::sync::Arc;

use quorate_core::Coordinator;
use tokio::{sync::mpsc, time::sleep};

use super::{coord, until_tickets};
use crate::{
    Clients,
    support::{QUIET, Running, SOON, cases, spawn, within},
};

cases!("fairness":
    grants_follow_arrival,
    five_clients_each_hold_once,
    a_cancelled_waiter_leaves_the_order_of_the_rest_intact,
    a_waiter_behind_a_cancelled_one_is_not_granted_early,
    contenders_that_come_back_all_get_their_turn,
    a_broken_lock_goes_to_the_next_in_line,
);

/// A waiter that says its number when granted, then waits to be told to release.
fn waiter(coord: &Coordinator, number: usize, granted: &mpsc::Sender<usize>) -> Running<()> {
    let (lock, granted) = (coord.lock("job"), granted.clone());
    spawn(async move {
        let guard = lock.acquire().await.expect("granted");
        granted.send(number).await.expect("the case listens");
        guard.release().await.expect("released");
    })
}

/// `count` waiters in a known order behind a held lock, on two clients in turn.
async fn line_up(clients: &Arc<dyn Clients>, count: usize) -> (Coordinator, Vec<Running<()>>, mpsc::Receiver<usize>) {
    let (tx, rx) = mpsc::channel(count);
    let coords = [coord(clients).await, coord(clients).await];
    let mut waiters = Vec::new();
    for number in 0..count {
        waiters.push(waiter(&coords[number % 2], number, &tx));
        // The holder makes one ticket, each waiter one more.
        until_tickets(&coords[0], "job", number + 2).await;
    }
    (coords[0].clone(), waiters, rx)
}

async fn next(granted: &mut mpsc::Receiver<usize>) -> usize {
    within(SOON, "the next grant", granted.recv()).await.expect("a waiter is left")
}

async fn grants_follow_arrival(clients: Arc<dyn Clients>) {
    let holder = coord(&clients).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (_coord, waiters, mut granted) = line_up(&clients, 8).await;
    guard.release().await.expect("released");
    for number in 0..waiters.len() {
        assert_eq!(next(&mut granted).await, number);
    }
}

async fn five_clients_each_hold_once(clients: Arc<dyn Clients>) {
    let (tx, mut granted) = mpsc::channel(5);
    let mut waiters = Vec::new();
    for number in 0..5 {
        waiters.push(waiter(&coord(&clients).await, number, &tx));
    }
    let mut seen = Vec::new();
    for _ in 0..5 {
        seen.push(next(&mut granted).await);
    }
    for waiter in &mut waiters {
        waiter.soon("a waiter ends").await;
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3, 4]);
}

async fn a_cancelled_waiter_leaves_the_order_of_the_rest_intact(clients: Arc<dyn Clients>) {
    let holder = coord(&clients).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (coord, mut waiters, mut granted) = line_up(&clients, 4).await;
    drop(waiters.remove(1));
    until_tickets(&coord, "job", 4).await;
    guard.release().await.expect("released");
    for number in [0, 2, 3] {
        assert_eq!(next(&mut granted).await, number);
    }
}

async fn a_waiter_behind_a_cancelled_one_is_not_granted_early(clients: Arc<dyn Clients>) {
    let holder = coord(&clients).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (coord, mut waiters, mut granted) = line_up(&clients, 2).await;
    // The first waiter is what the second waits for.
    drop(waiters.remove(0));
    until_tickets(&coord, "job", 2).await;
    sleep(QUIET).await;
    assert!(granted.try_recv().is_err(), "the holder still holds");
    assert!(guard.is_held());
    guard.release().await.expect("released");
    assert_eq!(next(&mut granted).await, 1);
}

async fn contenders_that_come_back_all_get_their_turn(clients: Arc<dyn Clients>) {
    const TURNS: usize = 10;
    let mut contenders = Vec::new();
    for _ in 0..3 {
        let coord = coord(&clients).await;
        contenders.push(spawn(async move {
            for _ in 0..TURNS {
                let guard = coord.lock("job").acquire().await.expect("granted");
                guard.release().await.expect("released");
            }
        }));
    }
    for contender in &mut contenders {
        contender.soon("every contender gets its turns").await;
    }
}

async fn a_broken_lock_goes_to_the_next_in_line(clients: Arc<dyn Clients>) {
    let holder = coord(&clients).await;
    let guard = holder.lock("job").acquire().await.expect("granted");
    let (coord, _waiters, mut granted) = line_up(&clients, 2).await;
    let broken = coord.lock("job").break_holder().await.expect("breaking works").expect("it was held");
    assert_eq!(broken.token, guard.token());
    assert_eq!(next(&mut granted).await, 0);
    within(SOON, "the old holder learns of it", guard.lost()).await;
    assert!(!guard.is_held());
    // Its release harms nobody, and says that the lock had been lost.
    assert!(guard.release().await.is_err());
    assert_eq!(next(&mut granted).await, 1);
}
