//! Transactions written as code: everything or nothing, and no attempt sees a world that never was.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quorate_core::{Error, ErrorKind, Kv, Result};

use super::coord;
use crate::{
    Clients,
    support::{cases, refused, spawn, within},
};

cases!("stm":
    transfers_between_accounts_conserve_the_sum,
    pairs_written_together_are_read_together_in_every_attempt,
    a_body_that_lost_a_race_runs_again,
    a_body_that_fails_or_is_dropped_writes_nothing,
    a_body_sees_its_own_writes_and_makes_new_keys,
    an_old_key_that_is_only_read_costs_no_second_attempt,
    a_key_that_was_missing_when_read_must_still_be_missing,
    the_writes_of_an_ended_hold_are_refused,
);

fn number(value: Option<Bytes>) -> u64 {
    value.map_or(0, |v| String::from_utf8_lossy(&v).parse().expect("a number was stored"))
}

async fn stored(kv: &Kv, key: &str) -> u64 {
    number(kv.get(key).await.expect("get").map(|entry| entry.value))
}

async fn transfers_between_accounts_conserve_the_sum(clients: Arc<dyn Clients>) {
    const ACCOUNTS: usize = 5;
    const EACH: usize = 8;
    let kv = coord(&clients).await.kv();
    for account in 0..ACCOUNTS {
        kv.put(&format!("account/{account}"), "100").await.expect("put");
    }
    let attempts = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for task in 0..6 {
        let (kv, attempts) = (coord(&clients).await.kv(), attempts.clone());
        tasks.push(spawn(async move {
            for turn in 0..EACH {
                // Every task walks over all pairs, each in another order.
                let from = format!("account/{}", (task + turn) % ACCOUNTS);
                let to = format!("account/{}", (task + 3 * turn + 1 + turn % 3) % ACCOUNTS);
                let (from, to, attempts) = (&from, &to, &attempts);
                let amount = kv.transact(|mut tx| async move {
                    attempts.fetch_add(1, Ordering::Relaxed);
                    let amount = (turn as u64 % 7 + 1).min(number(tx.get(from).await?));
                    // Time for the others to get in between.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    let left = number(tx.get(from).await?) - amount;
                    tx.put(from, left.to_string())?;
                    // Read after the write, so that a transfer to itself changes nothing.
                    let gained = number(tx.get(to).await?) + amount;
                    tx.put(to, gained.to_string())?;
                    Ok(amount)
                });
                amount.await.expect("a transfer ends");
            }
        }));
    }
    for task in &mut tasks {
        within(Duration::from_secs(50), "all transfers", &mut task.0).await.expect("no task fails");
    }
    let total = kv
        .transact(|mut tx| async move {
            let mut total = 0;
            for account in 0..ACCOUNTS {
                total += number(tx.get(&format!("account/{account}")).await?);
            }
            Ok(total)
        })
        .await;
    assert_eq!(total.expect("answered"), 100 * ACCOUNTS as u64);
    assert!(attempts.load(Ordering::Relaxed) > 6 * EACH, "no transfer met another: the case showed nothing");
}

async fn pairs_written_together_are_read_together_in_every_attempt(clients: Arc<dyn Clients>) {
    const ROUNDS: u64 = 60;
    let (writer, reader) = (coord(&clients).await.kv(), coord(&clients).await.kv());
    let mut writing = spawn(async move {
        for round in 1..=ROUNDS {
            // Written without a look, at times missing: both or none.
            let txn = writer.txn();
            let txn = if round % 5 == 0 {
                txn.delete("left").delete("right")
            } else {
                txn.put("left", round.to_string()).put("right", round.to_string())
            };
            let _ = txn.commit().await.expect("written");
            // At times too short for a look at both, at times long enough.
            tokio::time::sleep(Duration::from_millis(1 + round * 7 % 20)).await;
        }
    });
    let (looks, torn) = (&AtomicUsize::new(0), &AtomicUsize::new(0));
    while !writing.0.is_finished() {
        let read = reader.transact(|mut tx| async move {
            let left = tx.get("left").await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
            let right = tx.get("right").await?;
            looks.fetch_add(1, Ordering::Relaxed);
            torn.fetch_add(usize::from(left != right), Ordering::Relaxed);
            Ok(())
        });
        within(Duration::from_secs(20), "a read of the pair", read).await.expect("answered");
    }
    writing.soon("the writer").await;
    assert!(looks.load(Ordering::Relaxed) > 3, "hardly anything was read");
    assert_eq!(torn.load(Ordering::Relaxed), 0, "a body saw half of a write");
}

async fn a_body_that_lost_a_race_runs_again(clients: Arc<dyn Clients>) {
    let (kv, other) = (coord(&clients).await.kv(), coord(&clients).await.kv());
    kv.put("n", "1").await.expect("put");
    let (runs, other) = (&AtomicUsize::new(0), &other);
    let doubled = kv.transact(|mut tx| async move {
        let now = number(tx.get("n").await?);
        if runs.fetch_add(1, Ordering::Relaxed) == 0 {
            other.put("n", "5").await?;
        }
        tx.put("n", (2 * now).to_string())?;
        Ok(2 * now)
    });
    assert_eq!(doubled.await.expect("committed"), 10);
    assert_eq!((runs.load(Ordering::Relaxed), stored(&kv, "n").await), (2, 10));
}

async fn a_body_that_fails_or_is_dropped_writes_nothing(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    let failed: Result<()> = kv
        .transact(|mut tx| async move {
            tx.put("a", "1")?;
            Err(Error::invalid("transfer", "thought better of it"))
        })
        .await;
    refused(failed, ErrorKind::InvalidInput, "the body's own error");
    let never = kv.transact(|mut tx| async move {
        tx.put("a", "1")?;
        std::future::pending::<Result<()>>().await
    });
    assert!(tokio::time::timeout(Duration::from_millis(50), never).await.is_err());
    assert!(kv.get("a").await.expect("get").is_none(), "nothing is written before the end of the body");
}

async fn a_body_sees_its_own_writes_and_makes_new_keys(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    kv.put("old", "1").await.expect("put");
    let seen = kv.transact(|mut tx| async move {
        let before = tx.get("new").await?;
        tx.put("new", "2")?;
        tx.delete("old")?;
        Ok((before, tx.get("new").await?, tx.get("old").await?))
    });
    assert_eq!(seen.await.expect("committed"), (None, Some("2".into()), None));
    assert_eq!(stored(&kv, "new").await, 2);
    assert!(kv.get("old").await.expect("get").is_none());
    refused(kv.transact(|mut tx| async move { tx.put("", "x") }).await, ErrorKind::InvalidInput, "a bad key");
}

async fn an_old_key_that_is_only_read_costs_no_second_attempt(clients: Arc<dyn Clients>) {
    let kv = coord(&clients).await.kv();
    kv.put("a", "7").await.expect("put");
    let runs = &AtomicUsize::new(0);
    for _ in 0..2 {
        let copied = kv.transact(|mut tx| async move {
            runs.fetch_add(1, Ordering::Relaxed);
            let (a, b) = (number(tx.get("a").await?), number(tx.get("b").await?));
            tx.put("b", (a + b).to_string())
        });
        copied.await.expect("committed");
    }
    assert_eq!((runs.load(Ordering::Relaxed), stored(&kv, "b").await), (2, 14));
}

async fn a_key_that_was_missing_when_read_must_still_be_missing(clients: Arc<dyn Clients>) {
    let (kv, other) = (coord(&clients).await.kv(), coord(&clients).await.kv());
    let (runs, other) = (&AtomicUsize::new(0), &other);
    let claimed = kv.transact(|mut tx| async move {
        let taken = tx.get("seat").await?;
        if runs.fetch_add(1, Ordering::Relaxed) == 0 {
            other.put("seat", "1").await?;
        }
        if taken.is_none() {
            tx.put("seat", "2")?;
        }
        Ok(taken.is_none())
    });
    assert!(!claimed.await.expect("answered"), "the seat was taken by somebody else");
    assert_eq!((runs.load(Ordering::Relaxed), stored(&kv, "seat").await), (2, 1));
}

async fn the_writes_of_an_ended_hold_are_refused(clients: Arc<dyn Clients>) {
    let (a, b) = (coord(&clients).await, coord(&clients).await);
    let guard = a.lock("job").acquire().await.expect("granted");
    let fence = &guard.fence();
    let kv = &a.kv();
    let write = |value: &'static str| {
        kv.transact(move |mut tx| async move {
            tx.only_while(fence);
            let _ = tx.get("result").await?;
            tx.put("result", value)
        })
    };
    write("1").await.expect("the hold stands");
    b.lock("job").break_holder().await.expect("answered").expect("there was a holder");
    refused(write("2").await, ErrorKind::SessionLost, "a write of an ended hold");
    assert_eq!(stored(kv, "result").await, 1);
}
