//! Pages of the KV cache of many sequences: who holds which, which prefixes they keep, and the page tables of the device.
//!
//! A page is room for some positions' keys and values in every layer of a kind: layers that see everything share one pool,
//! sliding layers another, whose pages a sequence gives back when its window has passed them. A page is free; or held, by one
//! sequence or by several that begin alike; or kept: nobody holds it, but it belongs to a prefix that may come again, until
//! its room is wanted. Only whole pages are shared, and those are never written again.

use crate::device::Device;
use crate::error::Result;
use crate::program::Slice;
use crate::tokenizer::TokenId;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// The pool of layers that see everything, and of sliding layers.
const FULL: usize = 0;
const SLIDING: usize = 1;

/// What decides the bits of a position, beside all those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Held {
    pub token: TokenId,
    /// Whether the model drew it: kernels follow it (`program::Role`).
    pub drawn: bool,
}

/// Sizes of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Positions of a page.
    pub page: usize,
    /// Positions that a row of a sliding layer sees; `None`: the model has no such layer.
    pub window: Option<usize>,
    /// Most sequences at once.
    pub sequences: usize,
    /// Places of a sequence in a page table.
    pub places: usize,
    /// Most rows of a sequence that are under way beyond what it is known to hold.
    pub ahead: usize,
    /// Most rows of a step beside one of each sequence.
    pub rows: usize,
    /// Pages of each pool.
    pub pages: [usize; 2],
    /// Whether there would be more if the device bound more.
    pub bound: bool,
}

impl Sizes {
    /// Pages that a sequence of so many positions holds at most, of each pool: of the sliding one those of its window and
    /// of the rows that it always may add, one more for where they begin within a page, one for further rows in the same.
    pub fn most(&self, positions: usize) -> [usize; 2] {
        let full = positions.div_ceil(self.page);
        let sliding = |window: usize| full.min((window + self.ahead).div_ceil(self.page) + 2);
        [full, self.window.map_or(0, sliding)]
    }

    /// Pages that are never promised to a sequence, since the rows of a step pass through them before windows move on.
    pub fn spare(&self) -> [usize; 2] {
        [0, self.window.map_or(0, |_| self.rows.div_ceil(self.page))]
    }

    /// The first page that a row at position `len` and those after it look back to in a sliding layer.
    fn first_seen(&self, len: usize) -> usize {
        self.window.map_or(0, |window| (len + 1).saturating_sub(window) / self.page)
    }
}

/// How many pages of a pool there are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Nothing is in them.
    pub free: usize,
    /// Sessions that run hold them.
    pub held: usize,
    /// Nobody holds them; prefixes that may come again are in them until room is wanted.
    pub kept: usize,
}

/// The cache of many sequences.
#[derive(Debug)]
pub(crate) struct Kv {
    sizes: Sizes,
    /// Whether equal prefixes are kept once.
    share: bool,
    pools: [Pool; 2],
    tables: [Table; 2],
    sequences: Vec<Option<Sequence>>,
    /// The prefixes that pages hold, a node for each page of one; the empty one is `ROOT`.
    nodes: HashMap<u64, Node>,
    last_node: u64,
}

/// The prefix of nothing.
const ROOT: u64 = 0;
/// What leads to prefixes that nobody is to begin with.
const DISTRUSTED: u64 = 1;

#[derive(Debug)]
struct Pool {
    pages: Vec<Page>,
    free: Vec<u32>,
    /// By when they were let go: the least recently used first.
    kept: BTreeMap<u64, u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Page {
    holders: u32,
    /// The prefix that ends with this page, once the page is whole.
    node: Option<u64>,
    /// When it was let go.
    since: u64,
}

/// A prefix of whole pages.
#[derive(Debug)]
struct Node {
    parent: u64,
    /// What its last page holds.
    last: Arc<[Held]>,
    children: HashMap<Arc<[Held]>, u64>,
    /// Its last page in each pool. The first is there as long as the node is.
    pages: [Option<u32>; 2],
}

#[derive(Debug)]
struct Sequence {
    /// Positions that are computed.
    len: usize,
    /// The prefix of its whole pages.
    node: u64,
    /// By page of the sequence, in each pool.
    pages: [Vec<Option<u32>>; 2],
    held: [usize; 2],
    most: [usize; 2],
    /// Pages of the sliding pool before this one were given back.
    first: usize,
}

impl Pool {
    fn new(pages: usize) -> Self {
        let free = (0..pages as u32).rev().collect();
        Self { pages: vec![Page::default(); pages], free, kept: BTreeMap::new(), clock: 0 }
    }

    fn available(&self) -> usize {
        self.free.len() + self.kept.len()
    }

    fn hold(&mut self, page: u32) {
        let of = &mut self.pages[page as usize];
        if of.holders == 0 {
            self.kept.remove(&of.since);
        }
        of.holders += 1;
    }

    fn release(&mut self, page: u32) {
        let of = &mut self.pages[page as usize];
        of.holders -= 1;
        match (of.holders, of.node) {
            (0, None) => self.free.push(page),
            (0, Some(_)) => {
                self.clock += 1;
                of.since = self.clock;
                self.kept.insert(self.clock, page);
            }
            _ => {}
        }
    }
}

/// A page table as the device should have it.
#[derive(Debug)]
struct Table {
    /// Where it stands there; `None`: no layer reads it.
    slice: Option<Slice>,
    /// `[S, places]`.
    entries: Vec<u32>,
    /// By sequence: places that the device has not been told of.
    changed: BTreeMap<usize, Range<usize>>,
}

impl Table {
    fn put(&mut self, [slot, places, place]: [usize; 3], page: u32) {
        self.entries[slot * places + place] = page;
        let range = self.changed.entry(slot).or_insert(place..place + 1);
        *range = range.start.min(place)..range.end.max(place + 1);
    }
}

impl Kv {
    /// With all pages free. `tables`: where the device's page tables stand.
    pub fn new(sizes: Sizes, share: bool, tables: [Option<Slice>; 2]) -> Self {
        let table = |slice| Table { slice, entries: vec![0; sizes.sequences * sizes.places], changed: BTreeMap::new() };
        let root = || Node { parent: ROOT, last: Arc::new([]), children: HashMap::new(), pages: [None; 2] };
        Self {
            sizes,
            share,
            pools: sizes.pages.map(Pool::new),
            tables: tables.map(table),
            sequences: (0..sizes.sequences).map(|_| None).collect(),
            nodes: HashMap::from([(ROOT, root()), (DISTRUSTED, root())]),
            last_node: DISTRUSTED,
        }
    }

    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Whether equal prefixes are kept once.
    pub fn shares(&self) -> bool {
        self.share
    }

    /// Positions of a sequence that are computed.
    pub fn len(&self, slot: usize) -> usize {
        self.sequence(slot).len
    }

    /// How the pages of each pool are used.
    pub fn counts(&self) -> [Pages; 2] {
        self.pools.each_ref().map(|pool| Pages {
            free: pool.free.len(),
            held: pool.pages.len() - pool.available(),
            kept: pool.kept.len(),
        })
    }

    /// A place for a sequence that begins with `tokens` and becomes `positions` long at most, with all the pages that it may
    /// ever take promised to it. What is known of its tokens, but the last, is held already. `None`: there is no room now.
    pub fn admit(&mut self, tokens: &[Held], positions: usize) -> Option<usize> {
        let slot = self.sequences.iter().position(Option::is_none)?;
        let path = self.known(ROOT, 0, tokens);
        let (most, spare) = (self.sizes.most(positions), self.sizes.spare());
        let first = self.sizes.first_seen(path.len() * self.sizes.page);
        for kind in [FULL, SLIDING] {
            let wanted = path.iter().skip(if kind == SLIDING { first } else { 0 });
            let shared: Vec<u32> = wanted.filter_map(|node| self.nodes[node].pages[kind]).collect();
            let pool = &self.pools[kind];
            // Those that nobody holds come from what is available to all.
            let woken = shared.iter().filter(|page| pool.pages[**page as usize].holders == 0).count();
            let running = self.sequences.iter().flatten();
            let promised: usize = running.map(|s| s.most[kind].saturating_sub(s.held[kind])).sum();
            let more = most[kind].saturating_sub(shared.len());
            if pool.available() < woken + promised + more + spare[kind] {
                return None;
            }
        }
        let pages = [(); 2].map(|()| vec![None; self.sizes.places]);
        self.sequences[slot] = Some(Sequence { len: 0, node: ROOT, pages, held: [0; 2], most, first: 0 });
        self.adopt(slot, path);
        Some(slot)
    }

    /// Hold what has become known of a sequence's tokens since it was admitted.
    pub fn adopt_known(&mut self, slot: usize, tokens: &[Held]) {
        let s = self.sequence(slot);
        let path = self.known(s.node, s.len / self.sizes.page, tokens);
        if !path.is_empty() {
            self.adopt(slot, path);
        }
    }

    /// Take pages for positions below `to`.
    pub fn grow(&mut self, slot: usize, to: usize) {
        let kinds = if self.sizes.window.is_some() { &[FULL, SLIDING][..] } else { &[FULL] };
        for place in self.len(slot) / self.sizes.page..to.div_ceil(self.sizes.page) {
            for &kind in kinds {
                if self.sequence(slot).pages[kind][place].is_none() {
                    let page = self.take(kind);
                    self.put(slot, kind, place, page);
                }
            }
        }
    }

    /// The first `len` of `tokens` are computed: whole pages of them may be shared from now on, and those that no window looks
    /// back to are given back.
    pub fn commit(&mut self, slot: usize, tokens: &[Held], len: usize) {
        let page = self.sizes.page;
        if self.share {
            for place in self.len(slot) / page..len / page {
                self.name(slot, place, &tokens[place * page..(place + 1) * page]);
            }
        }
        self.sequence_mut(slot).len = len;
        self.pass(slot);
    }

    /// What a sequence computed is not to be believed: no other begins with it, or with a part of it, from now on. Those that did
    /// go on; as they end, the pages are used again.
    pub fn distrust(&mut self, slot: usize) {
        let mut node = self.sequence(slot).node;
        while ![ROOT, DISTRUSTED].contains(&node) {
            let Node { parent, last, .. } = &self.nodes[&node];
            let (parent, last) = (*parent, last.clone());
            if parent == ROOT {
                self.nodes.get_mut(&ROOT).expect("the root stays").children.remove(&last);
                self.nodes.get_mut(&node).expect("just seen").parent = DISTRUSTED;
            }
            node = parent;
        }
    }

    /// Give back the pages that were taken for positions that are not computed after all.
    pub fn shrink(&mut self, slot: usize) {
        let first = self.len(slot).div_ceil(self.sizes.page);
        for kind in [FULL, SLIDING] {
            (first..self.sizes.places).rev().for_each(|place| self.give_back(slot, kind, place));
        }
    }

    /// A sequence has ended. What it shares stays for as long as there is room.
    pub fn release(&mut self, slot: usize) {
        // From the end: a prefix must not lose a page before those that it leads to.
        for kind in [FULL, SLIDING] {
            (0..self.sizes.places).rev().for_each(|place| self.give_back(slot, kind, place));
        }
        self.sequences[slot] = None;
    }

    /// Tell the device which pages were taken, before any step that runs later.
    pub fn flush(&mut self, device: &Arc<dyn Device>) -> Result<()> {
        for table in &mut self.tables {
            while let Some((slot, range)) = table.changed.first_key_value() {
                if let Some(slice) = table.slice {
                    let first = slot * self.sizes.places + range.start;
                    let pages = &table.entries[first..first + range.len()];
                    let (offset, bytes) = (slice.offset + first as u64 * 4, pages.len() as u64 * 4);
                    device.write(Slice { offset, bytes, ..slice }, bytemuck::cast_slice(pages))?;
                }
                table.changed.pop_first();
            }
        }
        Ok(())
    }

    fn sequence(&self, slot: usize) -> &Sequence {
        self.sequences[slot].as_ref().expect("a slot is used only between `admit` and `release`")
    }

    fn sequence_mut(&mut self, slot: usize) -> &mut Sequence {
        self.sequences[slot].as_mut().expect("a slot is used only between `admit` and `release`")
    }

    /// The nodes of the longest prefix of `tokens`, after the first `whole` pages at `node`, that can be gone on from: without
    /// their last token, whose logits are wanted, and with all pages that windows look back to from there.
    fn known(&self, mut node: u64, whole: usize, tokens: &[Held]) -> Vec<u64> {
        let mut path = Vec::new();
        if !self.share {
            return path;
        }
        let page = self.sizes.page;
        for place in whole..tokens.len().saturating_sub(1) / page {
            let Some(child) = self.nodes[&node].children.get(&tokens[place * page..(place + 1) * page]) else { break };
            node = *child;
            path.push(node);
        }
        if self.sizes.window.is_some() {
            let complete = |path: &[u64]| {
                let seen = self.sizes.first_seen((whole + path.len()) * page).saturating_sub(whole);
                path[seen..].iter().all(|node| self.nodes[node].pages[SLIDING].is_some())
            };
            while !complete(&path) {
                path.pop();
            }
        }
        path
    }

    /// Go on from the end of `path`, which follows the sequence's whole pages.
    fn adopt(&mut self, slot: usize, path: Vec<u64>) {
        let whole = self.len(slot) / self.sizes.page;
        let end = whole + path.len();
        let first = self.sizes.first_seen(end * self.sizes.page);
        for (place, node) in (whole..).zip(&path) {
            for (kind, page) in self.nodes[node].pages.into_iter().enumerate() {
                if let Some(page) = page.filter(|_| kind == FULL || place >= first) {
                    self.hold(slot, kind, place, page);
                }
            }
        }
        if let Some(node) = path.last() {
            let len = end * self.sizes.page;
            let s = self.sequence_mut(slot);
            (s.node, s.len) = (*node, len);
        }
        self.pass(slot);
    }

    /// Give back sliding pages that no row to come looks back to.
    fn pass(&mut self, slot: usize) {
        let (from, to) = (self.sequence(slot).first, self.sizes.first_seen(self.len(slot)));
        (from..to).for_each(|place| self.give_back(slot, SLIDING, place));
        self.sequence_mut(slot).first = to;
    }

    /// A page of a sequence is whole: it ends a prefix from now on. Where that is known already, its pages are taken.
    fn name(&mut self, slot: usize, place: usize, tokens: &[Held]) {
        let parent = self.sequence(slot).node;
        let node = match self.nodes[&parent].children.get(tokens) {
            Some(node) => *node,
            None => {
                self.last_node += 1;
                let last: Arc<[Held]> = tokens.into();
                let new = Node { parent, last: last.clone(), children: HashMap::new(), pages: [None; 2] };
                self.nodes.insert(self.last_node, new);
                self.nodes.get_mut(&parent).expect("a held prefix stays").children.insert(last, self.last_node);
                self.last_node
            }
        };
        for kind in [FULL, SLIDING] {
            let own = self.sequence(slot).pages[kind][place];
            let of = self.nodes.get_mut(&node).expect("looked up above");
            match (of.pages[kind], own) {
                (Some(known), Some(own)) if known != own => self.hold(slot, kind, place, known),
                (None, Some(own)) => {
                    of.pages[kind] = Some(own);
                    self.pools[kind].pages[own as usize].node = Some(node);
                }
                _ => {}
            }
        }
        self.sequence_mut(slot).node = node;
    }

    /// Hold a page that is there already, in the place of the sequence's own if it has one.
    fn hold(&mut self, slot: usize, kind: usize, place: usize, page: u32) {
        self.pools[kind].hold(page);
        self.give_back(slot, kind, place);
        self.put(slot, kind, place, page);
    }

    fn put(&mut self, slot: usize, kind: usize, place: usize, page: u32) {
        let s = self.sequence_mut(slot);
        s.pages[kind][place] = Some(page);
        s.held[kind] += 1;
        self.tables[kind].put([slot, self.sizes.places, place], page);
    }

    fn give_back(&mut self, slot: usize, kind: usize, place: usize) {
        let s = self.sequence_mut(slot);
        if let Some(page) = s.pages[kind][place].take() {
            s.held[kind] -= 1;
            self.pools[kind].release(page);
        }
    }

    /// A page that nobody holds: a free one, or that of the prefix which was used the longest ago.
    fn take(&mut self, kind: usize) -> u32 {
        let pool = &mut self.pools[kind];
        let page = match pool.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = pool.kept.pop_first().expect("`admit` promises a sequence all pages that it takes");
                let node = pool.pages[page as usize].node.take().expect("a kept page ends a prefix");
                self.forget(kind, node);
                page
            }
        };
        self.pools[kind].pages[page as usize].holders = 1;
        page
    }

    /// A prefix has lost its page of a pool. Without the first there is nothing to go on from.
    fn forget(&mut self, kind: usize, node: u64) {
        if kind == SLIDING {
            self.nodes.get_mut(&node).expect("a page's prefix is there").pages[SLIDING] = None;
            return;
        }
        let Node { parent, last, pages, .. } = self.nodes.remove(&node).expect("a page's prefix is there");
        self.nodes.get_mut(&parent).expect("a prefix outlives what it leads to").children.remove(&last);
        if let Some(sliding) = pages[SLIDING] {
            let pool = &mut self.pools[SLIDING];
            let of = &mut pool.pages[sliding as usize];
            of.node = None;
            if of.holders == 0 {
                pool.kept.remove(&of.since);
                pool.free.push(sliding);
            }
        }
    }

    /// Every page is in one state, and in the one that sequences and prefixes say.
    pub fn check(&self) -> Result<(), String> {
        for (kind, pool) in self.pools.iter().enumerate() {
            let mut holders = vec![0; pool.pages.len()];
            for s in self.sequences.iter().flatten() {
                let held: Vec<u32> = s.pages[kind].iter().flatten().copied().collect();
                held.iter().for_each(|page| holders[*page as usize] += 1);
                if held.len() != s.held[kind] {
                    return Err(format!(
                        "pool {kind}: a sequence holds {} pages and says {}",
                        held.len(),
                        s.held[kind]
                    ));
                }
            }
            for (page, of) in (0..).zip(&pool.pages) {
                let free = pool.free.iter().filter(|free| **free == page).count();
                let kept = pool.kept.iter().filter(|(since, kept)| **kept == page && **since == of.since).count();
                let named =
                    of.node.is_none_or(|node| self.nodes.get(&node).is_some_and(|n| n.pages[kind] == Some(page)));
                let wanted = match (of.holders, of.node) {
                    (0, None) => [1, 0],
                    (0, Some(_)) => [0, 1],
                    _ => [0, 0],
                };
                if of.holders != holders[page as usize] || [free, kept] != wanted || !named {
                    return Err(format!(
                        "pool {kind}: page {page}, {of:?}, is held {} times, {free} times free and {kept} times kept",
                        holders[page as usize]
                    ));
                }
            }
        }
        for (id, node) in self.nodes.iter().filter(|(id, _)| ![ROOT, DISTRUSTED].contains(id)) {
            let leads_here = |parent: &Node| parent.children.get(&node.last) == Some(id);
            let known = node.parent == DISTRUSTED || self.nodes.get(&node.parent).is_some_and(leads_here);
            if !known || node.pages[FULL].is_none() {
                return Err(format!("prefix {id} is lost: {node:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::hash_map::DefaultHasher;
    use std::hash::{Hash, Hasher};

    fn random(state: &mut u64, below: usize) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*state >> 33) % below as u64) as usize
    }

    fn history(tokens: &[Held]) -> u64 {
        let mut hasher = DefaultHasher::new();
        tokens.hash(&mut hasher);
        hasher.finish()
    }

    /// What every position of both pools holds: the history that it was computed from.
    struct Memory {
        kv: Kv,
        holds: [Vec<u64>; 2],
        running: Vec<(usize, Vec<Held>)>,
    }

    impl Memory {
        fn place(&self, kind: usize, slot: usize, position: usize) -> usize {
            let Sizes { page, places, .. } = self.kv.sizes;
            self.kv.tables[kind].entries[slot * places + position / page] as usize * page + position % page
        }

        /// Compute positions of a sequence, as a step does.
        fn write(&mut self, at: usize, count: usize) {
            let (slot, tokens) = self.running[at].clone();
            let len = self.kv.len(slot);
            self.kv.grow(slot, len + count);
            for position in len..len + count {
                for kind in [FULL, SLIDING] {
                    let place = self.place(kind, slot, position);
                    self.holds[kind][place] = history(&tokens[..=position]);
                }
            }
        }

        /// All that rows to come see was computed from their own history.
        fn check(&self) -> Result<(), String> {
            self.kv.check()?;
            for (slot, tokens) in &self.running {
                let len = self.kv.len(*slot);
                let seen = (len + 1).saturating_sub(self.kv.sizes.window.unwrap_or(0));
                for (kind, first) in [(FULL, 0), (SLIDING, seen)] {
                    for position in first..len {
                        if self.holds[kind][self.place(kind, *slot, position)] != history(&tokens[..=position]) {
                            return Err(format!("pool {kind}: position {position} of {slot} is another's"));
                        }
                    }
                }
            }
            Ok(())
        }
    }

    fn soak(page: usize, share: bool, tight: usize, seed: u64) -> (Memory, usize) {
        let (window, rows, sequences, longest) = (11, 9, 4, 60);
        let pages = [0; 2];
        let mut sizes = Sizes {
            page,
            window: Some(window),
            sequences,
            places: 60usize.div_ceil(page),
            ahead: 2,
            rows,
            pages,
            bound: false,
        };
        // One pool or the other does not hold all sequences at their longest.
        let (most, spare) = (sizes.most(longest), sizes.spare());
        sizes.pages = match tight {
            FULL => [most[0] * 5 / 2, sequences * most[1] + spare[1]],
            _ => [sequences * most[0], most[1] * 3 / 2 + spare[1]],
        };
        let kv = Kv::new(sizes, share, [None; 2]);
        let holds = sizes.pages.map(|pages| vec![0; pages * page]);
        let (mut m, mut state, mut found) = (Memory { kv, holds, running: Vec::new() }, seed, 0);
        for _ in 0..3000 {
            let r = random(&mut state, 10);
            if r < 2 {
                // Few stems, in two roles, and tails that part.
                let (stem, drawn) = (random(&mut state, 2) as u32, random(&mut state, 4) == 0);
                let split = random(&mut state, 50);
                let token = |i: usize| if i < split { stem } else { 2 + stem + seed as u32 };
                let n = 1 + random(&mut state, longest);
                let tokens: Vec<Held> = (0..n).map(|i| Held { token: token(i), drawn: drawn && i > 20 }).collect();
                if let Some(slot) = m.kv.admit(&tokens, n) {
                    found += m.kv.len(slot);
                    m.running.push((slot, tokens));
                }
            } else if !m.running.is_empty() {
                let at = random(&mut state, m.running.len());
                let (slot, tokens) = m.running[at].clone();
                let left = tokens.len() - m.kv.len(slot);
                match r {
                    2 if left < tokens.len() => {
                        m.running.remove(at);
                        if random(&mut state, 8) == 0 {
                            m.kv.distrust(slot);
                        }
                        m.kv.release(slot);
                    }
                    3 => {
                        m.write(at, left.min(rows));
                        m.kv.shrink(slot);
                    }
                    4 => m.kv.adopt_known(slot, &tokens),
                    _ => {
                        let count = 1 + random(&mut state, rows);
                        m.write(at, left.min(count));
                        let len = m.kv.len(slot) + left.min(count);
                        m.kv.commit(slot, &tokens, len);
                    }
                }
            }
            m.check().unwrap();
        }
        (m, found)
    }

    #[test]
    fn whatever_comes_and_goes_everybody_sees_what_is_theirs() {
        for (page, tight, seed) in [(1, SLIDING, 1), (1, FULL, 2), (3, SLIDING, 3), (4, FULL, 4), (16, SLIDING, 5)] {
            for share in [false, true] {
                let (mut m, found) = soak(page, share, tight, seed);
                assert_eq!(found > 0, share, "{found} positions were known");
                for (slot, _) in std::mem::take(&mut m.running) {
                    m.kv.release(slot);
                }
                m.check().unwrap();
                for (pages, all) in m.kv.counts().into_iter().zip(m.kv.sizes.pages) {
                    assert_eq!((pages.held, pages.free + pages.kept), (0, all));
                    assert_eq!(pages.kept > 0, share);
                }
            }
        }
    }

    #[test]
    fn a_kept_prefix_that_is_held_again_is_no_room_for_others() {
        let sizes =
            Sizes { page: 2, window: None, sequences: 3, places: 10, ahead: 1, rows: 4, pages: [4, 0], bound: false };
        let mut kv = Kv::new(sizes, true, [None; 2]);
        let tokens = |first: u32| (first..first + 5).map(|token| Held { token, drawn: false }).collect::<Vec<_>>();
        let slot = kv.admit(&tokens(0), 5).unwrap();
        kv.grow(slot, 4);
        kv.commit(slot, &tokens(0), 4);
        kv.release(slot);
        assert_eq!(kv.counts()[FULL], Pages { free: 2, held: 0, kept: 2 });
        // Two of the four are promised to another; the prefix and one page more are three.
        let other = kv.admit(&tokens(9), 4).unwrap();
        assert_eq!(kv.admit(&tokens(0), 5), None);
        kv.release(other);
        let slot = kv.admit(&tokens(0), 5).unwrap();
        assert_eq!((kv.len(slot), kv.counts()[FULL]), (4, Pages { free: 2, held: 2, kept: 0 }));
        // What a session is promised takes the room of prefixes, the end of one before its beginning.
        kv.release(slot);
        let slot = kv.admit(&tokens(20), 6).unwrap();
        kv.grow(slot, 6);
        assert_eq!(kv.counts()[FULL], Pages { free: 0, held: 3, kept: 1 });
        kv.check().unwrap();
        kv.release(slot);
        let slot = kv.admit(&tokens(0), 5).unwrap();
        assert_eq!(kv.len(slot), 2);
    }

    #[test]
    fn what_is_distrusted_is_computed_anew() {
        let (places, pages) = (10, [12, 0]);
        let sizes = Sizes { page: 2, window: None, sequences: 3, places, ahead: 1, rows: 4, pages, bound: false };
        let mut kv = Kv::new(sizes, true, [None; 2]);
        let tokens: Vec<Held> = (0..7).map(|token| Held { token, drawn: false }).collect();
        let begin = |kv: &mut Kv, known: usize, to: usize| {
            let slot = kv.admit(&tokens, 7).unwrap();
            assert_eq!(kv.len(slot), known);
            kv.grow(slot, to);
            kv.commit(slot, &tokens, to);
            slot
        };
        let (bad, beside) = (begin(&mut kv, 0, 4), begin(&mut kv, 4, 6));
        kv.distrust(bad);
        kv.distrust(bad);
        kv.release(bad);
        kv.check().unwrap();
        let good = begin(&mut kv, 0, 6);
        kv.release(beside);
        kv.check().unwrap();
        // The pages of the others are taken, those of this one stay known.
        kv.release(good);
        let many: Vec<Held> = (100..112).map(|token| Held { token, drawn: false }).collect();
        let slot = kv.admit(&many, 12).unwrap();
        kv.grow(slot, 12);
        kv.commit(slot, &many, 12);
        kv.release(slot);
        kv.check().unwrap();
        begin(&mut kv, 6, 6);
        kv.check().unwrap();
    }

    #[test]
    fn a_leak_and_a_wrong_table_are_noticed() {
        let (mut m, _) = soak(4, true, FULL, 9);
        let lost =
            m.kv.pools[SLIDING].free.pop().or_else(|| m.kv.pools[SLIDING].kept.pop_first().map(|(_, page)| page));
        assert!(lost.is_some() && m.check().unwrap_err().contains("pool 1"));
        let (mut m, _) = soak(4, true, FULL, 9);
        let slot = m.running.iter().map(|(slot, _)| *slot).find(|slot| m.kv.len(*slot) > 0).unwrap();
        let places = m.kv.sizes.places;
        m.kv.tables[FULL].entries[slot * places] ^= 1;
        assert!(m.check().unwrap_err().contains("another's"));
    }
}
