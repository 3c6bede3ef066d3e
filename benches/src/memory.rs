//! What quorate itself costs: acquire + release on the memory backend, where no server hides it.
//!
//! One core, one task, one name. The rows add one part after another: the bare waist, the layers around it, the lock
//! recipe without layers, and everything, as `quorate::connect` gives it. No metrics recorder and no tracing
//! subscriber is installed, as in a program that asks for neither.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quorate::{
    Backend, Check, Coordinator, Dir, Enqueue, LeaseId, Nonce, SessionOptions, TicketKind, Txn, Write, layer::Stack,
    memory::Memory,
};
use tokio::time::Instant;

use crate::{
    Outcome,
    report::{Figure, Report, Row, Target},
    samples::{Budget, Spread},
};

/// Long enough that reading the clock does not count; short enough that most blocks lie within one slice of the
/// scheduler's, so that the median is that of an undisturbed core also on a busy machine.
const BLOCK: u32 = 100;
/// Of what an application uses.
const PAIRS_PER_SECOND: f64 = 500_000.0;
/// As for a backend that answers at once.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(6);

enum Subject {
    /// `enqueue` and `commit`, as the recipe calls them.
    Waist {
        backend: Arc<dyn Backend>,
        line: Dir,
        lease: LeaseId,
        value: Bytes,
    },
    Lock(Coordinator),
}

impl Subject {
    async fn waist(backend: Arc<dyn Backend>) -> quorate::Result<Self> {
        let lease = backend.grant(Duration::from_secs(3600)).await?.id;
        // As long as what the recipe writes.
        let value = Bytes::from_static(br#"{"owner":"4711@host","since_ms":1700000000000}"#);
        Ok(Self::Waist { backend, line: Dir::new(["lock", "orders"])?, lease, value })
    }

    async fn pair(&self) -> quorate::Result<()> {
        match self {
            Self::Lock(coord) => coord.lock("orders").acquire().await?.release().await,
            Self::Waist { backend, line, lease, value } => {
                let entry = Enqueue {
                    line: line.clone(),
                    kind: TicketKind::Lock,
                    lease: lease.clone(),
                    nonce: Nonce::random(),
                    value: value.clone(),
                    depth: 1,
                    when_free: false,
                };
                let place = backend.enqueue(&entry).await?.expect("it was not asked to join only a free line");
                let checks = vec![Check::Standing { ticket: place.ticket.clone(), token: place.token }];
                let txn = Txn { checks, writes: vec![Write::Leave(place.ticket)] };
                let commit = backend.commit(&txn).await?;
                assert!(commit.applied, "nobody else takes the ticket out of the line");
                Ok(())
            }
        }
    }

    /// Nanoseconds for each pair.
    async fn block(&self) -> quorate::Result<f64> {
        let started = Instant::now();
        for _ in 0..BLOCK {
            self.pair().await?;
        }
        Ok(started.elapsed().as_nanos() as f64 / f64::from(BLOCK))
    }
}

pub(crate) fn measure(budget: Budget) -> Outcome<Report> {
    eprintln!("memory: acquire + release on one core");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(measured(budget)).map_err(|e| e.to_string())
}

struct Part {
    what: &'static str,
    subject: Subject,
    target: Target,
    nanos: Spread,
}

impl Part {
    fn new(what: &'static str, subject: Subject, target: Target) -> Self {
        Self { what, subject, target, nanos: Spread::default() }
    }

    fn row(&self) -> Row {
        let nanos = self.nanos.at(0.5);
        Row {
            what: self.what.to_owned(),
            raw: Some(Figure::Time(Duration::from_nanos(nanos as u64))),
            ours: Figure::Rate(1e9 / nanos),
            ratio: None,
            target: self.target,
        }
    }
}

async fn measured(budget: Budget) -> quorate::Result<Report> {
    let memory = || Arc::new(Memory::new());
    let layered = Stack::new(memory()).standard(ATTEMPT_LIMIT).build();
    let bare = Subject::Lock(Coordinator::new(memory(), SessionOptions::default()));
    let whole = Subject::Lock(quorate::connect("memory://bench").await?);
    let mut parts = [
        Part::new("the waist: enqueue + commit", Subject::waist(memory()).await?, Target::None),
        Part::new("the waist with the standard layers", Subject::waist(layered).await?, Target::None),
        Part::new("lock without layers", bare, Target::None),
        Part::new("lock, standard stack", whole, Target::AtLeast(PAIRS_PER_SECOND)),
    ];
    for part in &parts {
        part.subject.block().await?;
    }
    let until = Instant::now() + budget.memory;
    let mut backwards = false;
    while Instant::now() < until {
        for i in 0..parts.len() {
            let part = if backwards { parts.len() - 1 - i } else { i };
            let nanos = parts[part].subject.block().await?;
            parts[part].nanos.add(nanos);
        }
        backwards = !backwards;
    }
    Ok(Report {
        title: "memory, one core, acquire + release".to_owned(),
        sides: ("a pair takes", "pairs"),
        rows: parts.iter().map(Part::row).collect(),
        notes: vec![format!("medians of blocks of {BLOCK} pairs")],
    })
}
