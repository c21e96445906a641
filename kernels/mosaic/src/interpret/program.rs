//! Compiles a kernel to the compact form that is executed: instructions over numbered registers, each register a flat
//! buffer of one size. A register is used again when its value has had its last use, so that a kernel's registers stay
//! in the CPU's caches.

use std::{collections::HashMap, panic::Location};

use crate::{
    Kernel,
    ir::{Block, Id, Op, OpKind, Types},
    types::{Content, Elem, RefType, Type},
};

/// The number of a register.
pub(super) type Reg = usize;

pub(super) struct Program {
    pub body: Vec<Inst>,
    /// Lanes of each register.
    pub registers: Vec<usize>,
    /// Views: one for each memory reference of the kernel.
    pub views: usize,
    /// Names of operations, by the number in [`Inst::name`].
    pub names: Vec<&'static str>,
}

pub(super) struct Inst {
    pub code: Code,
    pub name: usize,
    pub location: &'static Location<'static>,
}

/// A scalar or vector operand.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    pub reg: Reg,
    pub elem: Elem,
}

/// A copy of registers that happens all at once.
pub(super) struct Moves {
    pub pairs: Vec<(Reg, Reg)>,
    /// A destination is also a source.
    pub overlap: bool,
}

/// A region.
pub(super) struct Region {
    pub body: Vec<Inst>,
    pub yields: Moves,
}

pub(super) enum Code {
    /// A plain computation: see `compute.rs`.
    Compute {
        kind: OpKind,
        result: Lanes,
        operands: Vec<Lanes>,
        shapes: Vec<Vec<usize>>,
    },
    Load {
        view: usize,
        positions: Vec<Reg>,
        sizes: Vec<usize>,
        strides: Vec<usize>,
        result: Reg,
    },
    Store {
        view: usize,
        positions: Vec<Reg>,
        sizes: Vec<usize>,
        strides: Vec<usize>,
        value: Reg,
        mask: Option<Reg>,
    },
    ScalarLoad {
        view: usize,
        positions: Vec<Reg>,
        result: Reg,
    },
    ScalarStore {
        view: usize,
        positions: Vec<Reg>,
        value: Reg,
    },
    /// `sizes`: `None` takes the next of `dynamic`.
    Slice {
        from: usize,
        to: usize,
        positions: Vec<Reg>,
        sizes: Vec<Option<usize>>,
        dynamic: Vec<Reg>,
    },
    Squeeze {
        from: usize,
        to: usize,
        axes: Vec<usize>,
    },
    Reshape {
        from: usize,
        to: usize,
        dims: Vec<usize>,
    },
    Recast {
        from: usize,
        to: usize,
        elem: Elem,
        dims: Vec<usize>,
    },
    DmaStart {
        source: usize,
        destination: usize,
        semaphore: usize,
    },
    DmaWait {
        semaphore: usize,
        bytes_of: usize,
    },
    Signal {
        semaphore: usize,
        count: Reg,
    },
    WaitCount {
        semaphore: usize,
        count: Reg,
    },
    ReadCount {
        semaphore: usize,
        result: Reg,
    },
    For {
        bounds: [Reg; 3],
        index: Reg,
        enter: Moves,
        body: Region,
        exit: Moves,
    },
    If {
        condition: Reg,
        then: Region,
        otherwise: Region,
    },
    While {
        enter: Moves,
        verdict: Reg,
        condition: Vec<Inst>,
        pass: Moves,
        body: Region,
        exit: Moves,
    },
}

/// Where values live.
enum Home {
    Register(Reg),
    View(usize),
}

struct Compiler<'a> {
    types: &'a Types,
    homes: HashMap<Id, Home>,
    registers: Vec<usize>,
    /// Registers that hold nothing, by size.
    free: HashMap<usize, Vec<Reg>>,
    views: usize,
    names: Vec<&'static str>,
    /// For each value the operation of its block after which nobody uses it.
    last_use: HashMap<Id, usize>,
}

/// Compiles a kernel. `parameters` gets the views of its memories, in their order.
pub(super) fn compile(kernel: &Kernel) -> (Program, Vec<usize>) {
    let mut compiler = Compiler {
        types: &kernel.types,
        homes: HashMap::new(),
        registers: Vec::new(),
        free: HashMap::new(),
        views: 0,
        names: Vec::new(),
        last_use: HashMap::new(),
    };
    find_last_uses(&kernel.body, &mut Vec::new(), &mut HashMap::new(), &mut compiler.last_use);
    let parameters: Vec<_> = kernel.parameters().map(|id| compiler.new_view(id)).collect();
    let body = compiler.block(&kernel.body, &[], |_, _| {});
    let Compiler { registers, views, names, .. } = compiler;
    (Program { body, registers, views, names }, parameters)
}

/// `path` is the operation that is being visited in each open block; `depths` the block that defines each value.
fn find_last_uses(
    block: &Block,
    path: &mut Vec<usize>,
    depths: &mut HashMap<Id, usize>,
    last_use: &mut HashMap<Id, usize>,
) {
    let depth = path.len();
    path.push(0);
    depths.extend(block.arguments.iter().map(|id| (*id, depth)));
    // What a block yields is used after all its operations.
    let kept = block.arguments.iter().map(|id| (*id, block.ops.len()));
    last_use.extend(kept);
    for (at, op) in block.ops.iter().enumerate() {
        path[depth] = at;
        for id in &op.operands {
            if let Some(depth) = depths.get(id) {
                last_use.insert(*id, path[*depth]);
            }
        }
        op.regions.iter().for_each(|region| find_last_uses(region, path, depths, last_use));
        for id in &op.results {
            depths.insert(*id, depth);
            last_use.insert(*id, at);
        }
    }
    path[depth] = block.ops.len();
    for id in &block.yields {
        if let Some(depth) = depths.get(id) {
            last_use.insert(*id, path[*depth]);
        }
    }
    path.pop();
}

impl<'a> Compiler<'a> {
    /// Compiles a block whose arguments have homes. `end` sees the homes of what it yields before they are freed.
    fn block(&mut self, block: &'a Block, arguments: &[Id], end: impl FnOnce(&mut Self, &'a Block)) -> Vec<Inst> {
        let mut insts = Vec::with_capacity(block.ops.len());
        let mut expiring: Vec<Vec<Id>> = vec![Vec::new(); block.ops.len() + 1];
        expiring[block.ops.len()].extend(arguments);
        for (at, op) in block.ops.iter().enumerate() {
            for id in &op.results {
                if self.types[*id].elem().is_some() {
                    self.new_register(*id);
                } else {
                    self.new_view(*id);
                }
                expiring[self.last_use[id]].push(*id);
            }
            let code = self.op(op);
            let name = self.name(op.kind.name());
            insts.push(Inst { code, name, location: op.location });
            self.release(&std::mem::take(&mut expiring[at]));
        }
        end(self, block);
        expiring.iter().for_each(|ids| self.release(ids));
        insts
    }

    fn name(&mut self, name: &'static str) -> usize {
        self.names.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() - 1
        })
    }

    fn new_register(&mut self, id: Id) -> Reg {
        let lanes = self.types[id].dims().iter().product();
        let reg = self.free.get_mut(&lanes).and_then(Vec::pop).unwrap_or_else(|| {
            self.registers.push(lanes);
            self.registers.len() - 1
        });
        self.homes.insert(id, Home::Register(reg));
        reg
    }

    fn new_view(&mut self, id: Id) -> usize {
        self.homes.insert(id, Home::View(self.views));
        self.views += 1;
        self.views - 1
    }

    fn release(&mut self, ids: &[Id]) {
        for id in ids {
            if let Some(Home::Register(reg)) = self.homes.get(id) {
                self.free.entry(self.registers[*reg]).or_default().push(*reg);
            }
        }
    }

    /// The register of a scalar or vector. Every value of a kernel that was built has a home.
    fn reg(&self, id: Id) -> Reg {
        match self.homes.get(&id) {
            Some(Home::Register(reg)) => *reg,
            _ => unreachable!("%{} has no register", id.index()),
        }
    }

    fn view(&self, id: Id) -> usize {
        match self.homes.get(&id) {
            Some(Home::View(view)) => *view,
            _ => unreachable!("%{} is no memory", id.index()),
        }
    }

    fn regs(&self, ids: &[Id]) -> Vec<Reg> {
        ids.iter().map(|id| self.reg(*id)).collect()
    }

    fn lanes(&self, id: Id) -> Lanes {
        Lanes { reg: self.reg(id), elem: self.types[id].elem().unwrap_or(Elem::I32) }
    }

    fn moves(&self, from: &[Id], to: &[Id]) -> Moves {
        let (from, to) = (self.regs(from), self.regs(to));
        let overlap = to.iter().any(|reg| from.contains(reg));
        Moves { pairs: from.into_iter().zip(to).collect(), overlap }
    }

    fn reference(&self, id: Id) -> Option<&RefType> {
        match &self.types[id] {
            Type::Ref(reference) => Some(reference),
            _ => None,
        }
    }

    fn op(&mut self, op: &'a Op) -> Code {
        let (operands, results) = (op.operands.as_slice(), op.results.as_slice());
        match &op.kind {
            OpKind::Load { strides } => Code::Load {
                view: self.view(operands[0]),
                positions: self.regs(&operands[1..]),
                sizes: self.types[results[0]].dims().to_vec(),
                strides: strides.clone(),
                result: self.reg(results[0]),
            },
            OpKind::Store { strides, masked } => {
                let positions = &operands[2..operands.len() - usize::from(*masked)];
                Code::Store {
                    view: self.view(operands[1]),
                    positions: self.regs(positions),
                    sizes: self.types[operands[0]].dims().to_vec(),
                    strides: strides.clone(),
                    value: self.reg(operands[0]),
                    mask: masked.then(|| self.reg(operands[operands.len() - 1])),
                }
            }
            OpKind::ScalarLoad => Code::ScalarLoad {
                view: self.view(operands[0]),
                positions: self.regs(&operands[1..]),
                result: self.reg(results[0]),
            },
            OpKind::ScalarStore => Code::ScalarStore {
                view: self.view(operands[1]),
                positions: self.regs(&operands[2..]),
                value: self.reg(operands[0]),
            },
            OpKind::RefSlice | OpKind::RefSqueeze(_) | OpKind::RefReshape | OpKind::RefBitcast => self.view_op(op),
            OpKind::DmaStart => Code::DmaStart {
                source: self.view(operands[0]),
                destination: self.view(operands[1]),
                semaphore: self.view(operands[2]),
            },
            OpKind::DmaWait => Code::DmaWait { semaphore: self.view(operands[0]), bytes_of: self.view(operands[2]) },
            OpKind::SemaphoreSignal => Code::Signal { semaphore: self.view(operands[0]), count: self.reg(operands[1]) },
            OpKind::SemaphoreWait => {
                Code::WaitCount { semaphore: self.view(operands[0]), count: self.reg(operands[1]) }
            }
            OpKind::SemaphoreRead => {
                Code::ReadCount { semaphore: self.view(operands[0]), result: self.reg(results[0]) }
            }
            OpKind::For | OpKind::If | OpKind::While => self.control(op),
            kind => Code::Compute {
                kind: kind.clone(),
                result: self.lanes(results[0]),
                operands: operands.iter().map(|id| self.lanes(*id)).collect(),
                shapes: operands.iter().chain(results).map(|id| self.types[*id].dims().to_vec()).collect(),
            },
        }
    }

    fn view_op(&self, op: &Op) -> Code {
        let (from, to) = (self.view(op.operands[0]), self.view(op.results[0]));
        let result = self.reference(op.results[0]);
        let sizes = result.map(|result| result.dims.clone()).unwrap_or_default();
        let dims: Vec<usize> = sizes.iter().flatten().copied().collect();
        let elem = result.and_then(|result| match result.content {
            Content::Data(elem) => Some(elem),
            _ => None,
        });
        match &op.kind {
            OpKind::RefSqueeze(axes) => Code::Squeeze { from, to, axes: axes.clone() },
            OpKind::RefReshape => Code::Reshape { from, to, dims },
            OpKind::RefBitcast => Code::Recast { from, to, elem: elem.unwrap_or(Elem::I32), dims },
            _ => {
                let (positions, dynamic) = op.operands[1..].split_at(sizes.len());
                Code::Slice { from, to, positions: self.regs(positions), sizes, dynamic: self.regs(dynamic) }
            }
        }
    }

    fn control(&mut self, op: &'a Op) -> Code {
        match op.kind {
            OpKind::For => {
                let arguments = &op.regions[0].arguments;
                arguments.iter().for_each(|id| {
                    self.new_register(*id);
                });
                let enter = self.moves(&op.operands[3..], &arguments[1..]);
                let exit = self.moves(&arguments[1..], &op.results);
                let bounds = [0, 1, 2].map(|i| self.reg(op.operands[i]));
                let index = self.reg(arguments[0]);
                let body = self.region(&op.regions[0], arguments, &arguments[1..]);
                Code::For { bounds, index, enter, body, exit }
            }
            OpKind::If => {
                let condition = self.reg(op.operands[0]);
                let then = self.region(&op.regions[0], &[], &op.results);
                let otherwise = self.region(&op.regions[1], &[], &op.results);
                Code::If { condition, then, otherwise }
            }
            _ => {
                let (before, after) = (&op.regions[0], &op.regions[1]);
                for id in before.arguments.iter().chain(&after.arguments) {
                    self.new_register(*id);
                }
                let enter = self.moves(&op.operands, &before.arguments);
                let (mut verdict, mut pass, mut exit) = (0, None, None);
                let condition = self.block(before, &[], |compiler, block| {
                    verdict = compiler.reg(block.yields[0]);
                    pass = Some(compiler.moves(&block.yields[1..], &after.arguments));
                    exit = Some(compiler.moves(&block.yields[1..], &op.results));
                });
                let body = self.region(after, &after.arguments, &before.arguments);
                self.release(&before.arguments);
                let none = || Moves { pairs: Vec::new(), overlap: false };
                let (pass, exit) = (pass.unwrap_or_else(none), exit.unwrap_or_else(none));
                Code::While { enter, verdict, condition, pass, body, exit }
            }
        }
    }

    fn region(&mut self, block: &'a Block, arguments: &[Id], to: &[Id]) -> Region {
        let mut yields = None;
        let body = self.block(block, arguments, |compiler, block| yields = Some(compiler.moves(&block.yields, to)));
        Region { body, yields: yields.unwrap_or(Moves { pairs: Vec::new(), overlap: false }) }
    }
}
