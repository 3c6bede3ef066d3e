//! The instances, and the snapshot of them that picks go by.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Inner, Settings,
    choose::{Chooser, Kept, Nobody},
    member::{Member, State},
};
use crate::discovery::Instance;

/// What was set last.
#[derive(Debug, Default)]
pub(super) struct Roster {
    /// By service and id.
    all: BTreeMap<(String, String), Arc<Member>>,
    /// Those that pass, in the same order.
    passing: Vec<Arc<Member>>,
    kept: Kept,
}

/// What picks go by. Never changed, but replaced.
#[derive(Debug)]
pub(super) struct View {
    /// Those that may be picked, in the order of service and id.
    pub(super) members: Vec<Arc<Member>>,
    pub(super) chooser: Box<dyn Chooser>,
    /// When the next ejected instance comes back, and this is out of date.
    pub(super) returns_at: u64,
}

impl Default for View {
    fn default() -> Self {
        Self { members: Vec::new(), chooser: Box::new(Nobody), returns_at: u64::MAX }
    }
}

impl Roster {
    pub(super) fn all(&self) -> impl Iterator<Item = &Member> {
        self.all.values().map(|member| &**member)
    }

    pub(super) fn passing(&self) -> &[Arc<Member>] {
        &self.passing
    }

    pub(super) fn set(&mut self, instances: impl IntoIterator<Item = Arc<Instance>>, home: &Arc<Inner>) {
        let mut all = BTreeMap::new();
        for instance in instances {
            let name = (instance.service.clone(), instance.id.clone());
            let known = self.all.get(&name).or_else(|| all.get(&name));
            let state = known.map_or_else(|| Arc::new(State::new(home)), |member| Arc::clone(&member.state));
            all.insert(name, Arc::new(Member::new(instance, state)));
        }
        self.passing = all.values().filter(|member| member.instance.is_passing()).cloned().collect();
        self.all = all;
    }

    /// The view as of now.
    pub(super) fn view(&mut self, settings: &Settings, now: u64) -> View {
        self.keep_to_the_share(settings, now);
        let mut pickable: Vec<usize> = (0..self.passing.len()).collect();
        pickable.retain(|place| !self.passing[*place].state.is_ejected(now));
        if let Some(zone) = &settings.zone {
            let near = |place: &usize| self.passing[*place].instance.zone.as_deref() == Some(zone.name.as_str());
            let near: Vec<_> = pickable.iter().copied().filter(near).collect();
            if near.len() >= zone.at_least {
                pickable = near;
            }
        }
        let ends = self.passing.iter().map(|member| member.state.back_at());
        let returns_at = ends.filter(|end| *end > now).min().unwrap_or(u64::MAX);
        let members: Vec<_> = pickable.iter().map(|place| Arc::clone(&self.passing[*place])).collect();
        let chooser: Box<dyn Chooser> = if members.is_empty() {
            Box::new(Nobody)
        } else {
            settings.strategy.chooser(&self.passing, &pickable, &members, &mut self.kept)
        };
        View { members, chooser, returns_at }
    }

    /// A set that has shrunk may have more of its instances ejected than is allowed: who would be back first is back
    /// now.
    fn keep_to_the_share(&self, settings: &Settings, now: u64) {
        let Some(ejection) = &settings.ejection else { return };
        let mut out: Vec<_> = self.passing.iter().filter(|member| member.state.is_ejected(now)).collect();
        let excess = out.len().saturating_sub(ejection.allowed(self.passing.len()));
        out.sort_by_key(|member| member.state.back_at());
        out.iter().take(excess).for_each(|member| member.state.readmit(now));
    }
}
