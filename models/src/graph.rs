//! What stateright does not ask: whether an end can still be reached.
//!
//! Promise: [`Graph::stuck`] finds a state from which no path leads to the goal, if there is one. stateright's `eventually`
//! gives up where paths meet again or go in circles, and here messages are repeated without end. If the goal can be
//! reached from every state, it is reached in every fair run.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

use stateright::Model;

/// All states of a model, and the steps between them.
#[derive(Debug)]
pub struct Graph<M: Model> {
    states: Vec<M::State>,
    /// How each state was first met: from where, by what. None for the initial ones.
    met: Vec<Option<(u32, M::Action)>>,
    /// Steps, as (to, from).
    steps: Vec<(u32, u32)>,
    /// For each state, those of `steps` that lead to it begin here.
    begins: Vec<u32>,
}

impl<M: Model> Graph<M>
where
    M::State: Clone + Eq + Hash,
    M::Action: Clone,
{
    /// Visits every state. Of the steps, those that `counts` are remembered: a path to the goal may be asked to do without
    /// the help of somebody.
    pub fn of(model: &M, counts: impl Fn(&M::Action) -> bool) -> Self {
        let mut graph = Self { states: Vec::new(), met: Vec::new(), steps: Vec::new(), begins: Vec::new() };
        let mut known = HashMap::new();
        for state in model.init_states() {
            graph.visit(&mut known, state, None);
        }
        let mut next = 0;
        let mut actions = Vec::new();
        while let Some(state) = graph.states.get(next as usize).cloned() {
            model.actions(&state, &mut actions);
            for action in actions.drain(..) {
                let Some(to) = model.next_state(&state, action.clone()) else { continue };
                let counted = counts(&action);
                let to = graph.visit(&mut known, to, Some((next, action)));
                if counted {
                    graph.steps.push((to, next));
                }
            }
            next += 1;
        }
        graph.steps.sort_unstable();
        graph.begins = vec![0; graph.states.len() + 1];
        for (to, _) in &graph.steps {
            graph.begins[*to as usize + 1] += 1;
        }
        for at in 1..graph.begins.len() {
            graph.begins[at] += graph.begins[at - 1];
        }
        graph
    }

    fn visit(&mut self, known: &mut HashMap<M::State, u32>, state: M::State, by: Option<(u32, M::Action)>) -> u32 {
        *known.entry(state).or_insert_with_key(|state| {
            self.states.push(state.clone());
            self.met.push(by);
            u32::try_from(self.states.len() - 1).expect("fewer states than would fill the memory")
        })
    }

    /// How many states there are.
    pub fn states(&self) -> usize {
        self.states.len()
    }

    /// The shortest way to such a state: the steps, each with the state before it.
    pub fn first(&self, wanted: impl Fn(&M::State) -> bool) -> Option<Vec<(M::State, M::Action)>> {
        let mut at = self.states.iter().position(wanted)?;
        let mut way = Vec::new();
        while let Some((from, action)) = &self.met[at] {
            at = *from as usize;
            way.push((self.states[at].clone(), action.clone()));
        }
        way.reverse();
        Some(way)
    }

    /// The shortest way to a state among `from` that cannot reach the goal, and the state.
    pub fn stuck(
        &self,
        from: impl Fn(&M::State) -> bool,
        goal: impl Fn(&M::State) -> bool,
    ) -> Option<(Vec<M::Action>, &M::State)> {
        let mut reaches: Vec<bool> = self.states.iter().map(goal).collect();
        let mut open: VecDeque<usize> = (0..self.states.len()).filter(|at| reaches[*at]).collect();
        while let Some(to) = open.pop_front() {
            let range = self.begins[to] as usize..self.begins[to + 1] as usize;
            for (_, from) in &self.steps[range] {
                let from = *from as usize;
                if !std::mem::replace(&mut reaches[from], true) {
                    open.push_back(from);
                }
            }
        }
        let lost = (0..self.states.len()).find(|at| !reaches[*at] && from(&self.states[*at]))?;
        Some((self.way(lost), &self.states[lost]))
    }

    fn way(&self, mut at: usize) -> Vec<M::Action> {
        let mut way = Vec::new();
        while let Some((from, action)) = &self.met[at] {
            way.push(action.clone());
            at = *from as usize;
        }
        way.reverse();
        way
    }
}
