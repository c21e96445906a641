//! Executes a compiled kernel.

use std::panic::Location;

use crate::{
    interpret::{
        compute::{Operands, compute},
        dma::Machine,
        fault::{Fault, FaultKind, Place},
        memory::View,
        program::{Code, Inst, Moves, Program, Reg, Region},
        register::Register,
    },
    ir::OpKind,
};

/// What a memory is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Operand(usize),
    /// An output, or an operand that an output takes over.
    Output(usize),
    Scratch,
}

pub(super) struct Runner<'a> {
    pub program: &'a Program,
    pub machine: Machine,
    pub registers: Vec<Register>,
    /// For each memory reference of the kernel the box it refers to now.
    pub views: Vec<View>,
    /// What lies in each memory.
    pub roles: Vec<Role>,
    /// For each memory where something undefined was last stored to it.
    pub tainted: Vec<Option<Place>>,
    pub allow_undefined_outputs: bool,
    /// Executions of each operation, by the number of its name.
    pub executed: Vec<u64>,
    pub ops_left: u64,
    pub max_ops: u64,
}

impl Runner<'_> {
    pub fn block(&mut self, insts: &[Inst]) -> Result<(), Fault> {
        for inst in insts {
            self.executed[inst.name] += 1;
            let operation = self.program.names[inst.name];
            let fault = |kind| Fault { kind, operation, location: inst.location };
            let endless = fault(FaultKind::Endless { limit: self.max_ops });
            self.ops_left = self.ops_left.checked_sub(1).ok_or(endless)?;
            match &inst.code {
                Code::For { bounds, index, enter, body, exit } => {
                    let bounds = self.bounds(bounds).map_err(fault)?;
                    self.move_all(enter);
                    let (mut at, end, step) = bounds;
                    while at < end {
                        self.set(*index, at as i32);
                        self.region(body)?;
                        at += step;
                    }
                    self.move_all(exit);
                }
                Code::If { condition, then, otherwise } => {
                    let holds = self.scalar(*condition, "condition").map_err(fault)? != 0;
                    self.region(if holds { then } else { otherwise })?;
                }
                Code::While { enter, verdict, condition, pass, body, exit } => {
                    self.move_all(enter);
                    loop {
                        self.block(condition)?;
                        if self.scalar(*verdict, "condition").map_err(fault)? == 0 {
                            break;
                        }
                        self.move_all(pass);
                        self.region(body)?;
                    }
                    self.move_all(exit);
                }
                code => {
                    self.step(code, inst.location).map_err(fault)?;
                }
            }
        }
        Ok(())
    }

    fn region(&mut self, region: &Region) -> Result<(), Fault> {
        self.block(&region.body)?;
        self.move_all(&region.yields);
        Ok(())
    }

    fn bounds(&self, bounds: &[Reg; 3]) -> Result<(i64, i64, i64), FaultKind> {
        let [from, to, step] = bounds.map(|reg| self.scalar(reg, "loop bound"));
        let step = step?;
        if step <= 0 {
            return Err(FaultKind::Step { step });
        }
        Ok((from?.into(), to?.into(), step.into()))
    }

    fn move_all(&mut self, moves: &Moves) {
        if moves.overlap {
            let sources: Vec<_> = moves.pairs.iter().map(|(from, _)| self.registers[*from].clone()).collect();
            for (source, (_, to)) in sources.into_iter().zip(&moves.pairs) {
                self.registers[*to] = source;
            }
            return;
        }
        for (from, to) in &moves.pairs {
            let mut target = std::mem::take(&mut self.registers[*to]);
            target.clone_from(&self.registers[*from]);
            self.registers[*to] = target;
        }
    }

    fn set(&mut self, reg: Reg, value: i32) {
        self.registers[reg].lanes[0] = value as u32;
        self.registers[reg].dirty = false;
    }

    /// A scalar on which control flow or an address depends.
    fn scalar(&self, reg: Reg, what: &'static str) -> Result<i32, FaultKind> {
        match self.registers[reg].is_undefined() {
            true => Err(FaultKind::UndefinedControl { what }),
            false => Ok(self.registers[reg].lanes[0] as i32),
        }
    }

    fn step(&mut self, code: &Code, location: &'static Location<'static>) -> Result<(), FaultKind> {
        match code {
            Code::Compute { kind, result, operands, shapes } => {
                let mut out = std::mem::take(&mut self.registers[result.reg]);
                let all = Operands { registers: &self.registers, lanes: operands, shapes };
                let done = compute(kind, result.elem, &all, &mut out);
                let lanes = out.lanes.len() as u64;
                match kind {
                    OpKind::Matmul(product) => {
                        let summed = shapes[0][product.lhs_axis] as u64;
                        self.machine.counters.matmul_flops += 2 * lanes * summed;
                    }
                    OpKind::Unary(unary) if unary.is_transcendental() => {
                        self.machine.counters.transcendentals += lanes;
                    }
                    _ => {}
                }
                self.registers[result.reg] = out;
                done
            }
            Code::Load { view, positions, sizes, strides, result } => {
                let view = self.boxed(*view, positions, sizes, strides)?;
                self.machine.load(&view, &mut self.registers[*result])
            }
            Code::Store { view, positions, sizes, strides, value, mask } => {
                let view = self.boxed(*view, positions, sizes, strides)?;
                self.store(&view, *value, *mask, location)
            }
            Code::ScalarLoad { view, positions, result } => {
                let view = self.boxed(*view, positions, &vec![1; positions.len()], &[])?;
                self.machine.load(&view, &mut self.registers[*result])
            }
            Code::ScalarStore { view, positions, value } => {
                let view = self.boxed(*view, positions, &vec![1; positions.len()], &[])?;
                self.store(&view, *value, None, location)
            }
            Code::DmaStart { source, destination, semaphore } => {
                let (source, destination) = (self.views[*source], self.views[*destination]);
                let role = self.writable(&destination)?;
                if let Role::Output(output) = role
                    && !self.allow_undefined_outputs
                    && self.machine.memories[source.memory].is_undefined(&source)
                {
                    if self.machine.memories[destination.memory].space.is_main() {
                        return Err(FaultKind::UndefinedOutput { output });
                    }
                    self.tainted[destination.memory] = Some(Place(location));
                }
                self.machine.start(source, destination, self.views[*semaphore].offset(), location)
            }
            Code::DmaWait { semaphore, bytes_of } => {
                self.machine.wait(self.views[*semaphore].offset(), self.views[*bytes_of].bytes())
            }
            Code::Signal { semaphore, count } => {
                let count = self.scalar(*count, "count")?;
                self.machine.signal(self.views[*semaphore].offset(), count, location)
            }
            Code::WaitCount { semaphore, count } => {
                let count = self.scalar(*count, "count")?;
                self.machine.wait_count(self.views[*semaphore].offset(), count)
            }
            Code::ReadCount { semaphore, result } => {
                let count = self.machine.count(self.views[*semaphore].offset());
                self.set(*result, count);
                Ok(())
            }
            code => self.change_view(code),
        }
    }

    fn change_view(&mut self, code: &Code) -> Result<(), FaultKind> {
        match code {
            Code::Slice { from, to, positions, sizes, dynamic } => {
                let mut dynamic = dynamic.iter();
                let mut size_of = |size: &Option<usize>| match size.map_or_else(|| dynamic.next(), |_| None) {
                    Some(reg) => {
                        let size = self.scalar(*reg, "size")?;
                        usize::try_from(size).map_err(|_| FaultKind::NegativeCount { count: size.into() })
                    }
                    None => Ok(size.unwrap_or(0)),
                };
                let sizes: Vec<_> = sizes.iter().map(&mut size_of).collect::<Result<_, _>>()?;
                self.views[*to] = self.boxed(*from, positions, &sizes, &[])?;
            }
            Code::Squeeze { from, to, axes } => {
                let mut view = self.views[*from];
                view.squeeze(axes);
                self.views[*to] = view;
            }
            Code::Reshape { from, to, dims } => self.views[*to] = self.views[*from].reshape(dims)?,
            Code::Recast { from, to, elem, dims } => self.views[*to] = self.views[*from].bitcast(*elem, dims)?,
            _ => unreachable!("control flow is executed by `block`"),
        }
        Ok(())
    }

    /// A box of a view.
    fn boxed(&self, view: usize, positions: &[Reg], sizes: &[usize], strides: &[usize]) -> Result<View, FaultKind> {
        let mut view = self.views[view];
        for (axis, (reg, size)) in positions.iter().zip(sizes).enumerate() {
            let start = self.scalar(*reg, "address")?;
            view.slice(axis, start.into(), *size, strides.get(axis).copied().unwrap_or(1))?;
        }
        Ok(view)
    }

    /// What a box that is to be written is for.
    fn writable(&self, view: &View) -> Result<Role, FaultKind> {
        match self.roles[view.memory] {
            Role::Operand(operand) => Err(FaultKind::OperandWritten { operand }),
            role => Ok(role),
        }
    }

    fn store(
        &mut self,
        view: &View,
        value: Reg,
        mask: Option<Reg>,
        location: &'static Location<'static>,
    ) -> Result<(), FaultKind> {
        self.writable(view)?;
        let value = &self.registers[value];
        match mask {
            None => self.machine.store(view, value)?,
            Some(mask) => self.machine.store_masked(view, value, &self.registers[mask])?,
        }
        if value.is_undefined() {
            self.tainted[view.memory] = Some(Place(location));
        }
        Ok(())
    }
}
