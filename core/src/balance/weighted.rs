//! Smooth weighted round robin, lock-free after the first cycle.

use std::sync::{
    Arc, Mutex, OnceLock, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use super::{
    choose::{Chooser, Open, any},
    member::Member,
};

/// Longer cycles are shortened by halving the weights: 4 MiB.
const MAX_CYCLE: u64 = 1 << 20;
/// How many picks are computed at a time.
const PIECE: usize = 64;

/// The picks of one cycle. nginx's algorithm changes every instance's score with every pick, which no atomic can do;
/// but after a cycle all scores are what they were before, so that the picks of one cycle are those of all.
#[derive(Debug)]
struct Sequence {
    cycle: u64,
    next: AtomicU64,
    /// Each is set once, in this order.
    pieces: Vec<OnceLock<Box<[u32]>>>,
    maker: Mutex<Maker>,
}

#[derive(Debug)]
struct Maker {
    weights: Vec<i64>,
    scores: Vec<i64>,
    /// How many pieces there are.
    made: usize,
}

impl Maker {
    /// All scores rise by their weight; the highest wins, the first of equals, and pays the total.
    fn next(&mut self, total: i64) -> u32 {
        let mut best = 0;
        for place in 0..self.weights.len() {
            self.scores[place] += self.weights[place];
            if self.scores[place] > self.scores[best] {
                best = place;
            }
        }
        self.scores[best] -= total;
        u32::try_from(best).expect("there are fewer instances than picks in the longest cycle")
    }
}

impl Sequence {
    fn new(weights: impl Iterator<Item = u32>) -> Self {
        let weights = shorten(weights.map(u64::from).collect());
        let cycle: u64 = weights.iter().sum();
        let pieces = usize::try_from(cycle.div_ceil(PIECE as u64)).expect("a cycle has a bounded length");
        let weights: Vec<_> = weights.into_iter().map(|w| i64::try_from(w).expect("it was a u32")).collect();
        let maker = Mutex::new(Maker { scores: vec![0; weights.len()], weights, made: 0 });
        Self { cycle, next: AtomicU64::new(0), pieces: (0..pieces).map(|_| OnceLock::new()).collect(), maker }
    }

    fn next(&self) -> usize {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.cycle;
        let turn = usize::try_from(turn).expect("a cycle has a bounded length");
        let piece = match self.pieces[turn / PIECE].get() {
            Some(piece) => piece,
            None => self.make(turn / PIECE),
        };
        piece[turn % PIECE] as usize
    }

    /// Makes all pieces up to this one.
    fn make(&self, wanted: usize) -> &[u32] {
        let mut maker = self.maker.lock().unwrap_or_else(PoisonError::into_inner);
        let total = i64::try_from(self.cycle).expect("a cycle has a bounded length");
        while maker.made <= wanted {
            let piece = (0..PIECE).map(|_| maker.next(total)).collect();
            self.pieces[maker.made].set(piece).expect("pieces are made under the lock only");
            maker.made += 1;
        }
        self.pieces[wanted].get().expect("it was made by now")
    }
}

/// The same shares in a cycle as short as it can be, or short enough.
fn shorten(mut weights: Vec<u64>) -> Vec<u64> {
    let divisor = weights.iter().fold(0, |a, b| gcd(a, *b)).max(1);
    weights.iter_mut().for_each(|weight| *weight /= divisor);
    let limit = MAX_CYCLE.max(weights.len() as u64);
    while weights.iter().sum::<u64>() > limit {
        weights.iter_mut().for_each(|weight| *weight = (*weight / 2).max(1));
    }
    weights
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A sequence and whom it is for: service, id and weight.
#[derive(Debug)]
pub(super) struct Last {
    names: Vec<(String, String, u32)>,
    sequence: Arc<Sequence>,
}

/// Goes on with the last sequence if it was for the same instances and weights: a set that is repeated does not begin
/// again with the heaviest.
pub(super) fn chooser(members: &[Arc<Member>], last: &mut Option<Last>) -> Weighted {
    let name = |m: &Arc<Member>| (m.instance.service.clone(), m.instance.id.clone(), m.weight());
    let names: Vec<_> = members.iter().map(name).collect();
    let last = match last {
        Some(last) if last.names == names => last,
        _ => {
            let sequence = Arc::new(Sequence::new(names.iter().map(|(_, _, weight)| *weight)));
            last.insert(Last { names, sequence })
        }
    };
    Weighted(Arc::clone(&last.sequence))
}

#[derive(Debug)]
pub(super) struct Weighted(Arc<Sequence>);

impl Chooser for Weighted {
    fn choose(&self, _: &[Arc<Member>], _: Option<&[u8]>, _: u64) -> Option<usize> {
        Some(self.0.next())
    }

    fn choose_open(&self, members: &[Arc<Member>], open: Open<'_>, _: Option<&[u8]>, _: u64) -> Option<usize> {
        let mut turns = (0..PIECE).map(|_| self.0.next());
        turns.find(|place| open(*place)).or_else(|| any(members.len(), open))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picks(weights: &[u32], count: usize) -> Vec<usize> {
        let sequence = Sequence::new(weights.iter().copied());
        (0..count).map(|_| sequence.next()).collect()
    }

    #[test]
    fn the_sequence_is_nginxs() {
        // nginx's own example: a a b a c a a for weights 5, 1, 1.
        assert_eq!(picks(&[5, 1, 1], 14), [0, 0, 1, 0, 2, 0, 0, 0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(picks(&[50, 10, 10], 7), [0, 0, 1, 0, 2, 0, 0], "common divisors do not count");
        assert_eq!(picks(&[7, 7, 7], 6), [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn great_weights_make_no_endless_cycle() {
        for weights in [vec![1_000_000, 999_999, 1], vec![u32::MAX; 3], (1..=2_000).map(|i| i * 499 + 1).collect()] {
            let sequence = Sequence::new(weights.iter().copied());
            assert!(sequence.cycle <= MAX_CYCLE, "{}", sequence.cycle);
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            let maker = sequence.maker.lock().expect("not poisoned");
            for (short, weight) in maker.weights.iter().zip(&weights) {
                let (is, shall) = (*short as f64, sequence.cycle as f64 * f64::from(*weight) / total);
                assert!((is - shall).abs() <= 1.0 + shall * 0.001, "{is} for {shall}");
            }
        }
    }
}
