//! Small programs beside the step: they set up the arrays that stay on the device and load rows of them.
//!
//! Where devices share a model, each runs them on its own arrays.
//!
//! They run between steps, in order with them, and are compiled before the engine is ready like every other program.

use torus_abi::{DType, TensorType, model::Parallel};
use torus_hlo::{
    Axis, Builder, Scatter, Shape, Value,
    axes::{SLOTS, VOCAB},
};

use super::{Arguments, AssembleError};

/// Entries that one execution of a loader takes. Longer lists take several.
pub(crate) const LOAD_ENTRIES: usize = 512;

const ENTRIES: Axis = Axis("entries");

/// `() -> (last_tokens, page_table, allowed, (token_counts, bias, pools…)?)`: all zero, and everything allowed. The large
/// ones are left out where the host has cheaper zeros ([`crate::device::Target::zeros`]).
pub(crate) fn initial_state(
    arguments: &Arguments,
    with_large: bool,
    parallel: Parallel,
) -> Result<String, AssembleError> {
    let rows = &arguments.rows;
    module("initial_state", parallel, |builder| {
        builder.main(|f| {
            let zeros = |tensor: &TensorType| f.zeros(Shape::opaque(tensor));
            let mut results: Vec<Value<'_>> = [&rows.last_tokens, &rows.page_table].map(zeros).into();
            results.push(f.full(Shape::opaque(&rows.allowed), u32::MAX));
            if with_large {
                results.extend(arguments.large().map(zeros));
            }
            results
        });
    })
}

/// `(array [slots, vocab] donated, slot [], ids [entries], values [entries], clear []) -> array`: sets entries of a
/// slot's row, after zeroing it if `clear` is not 0. Ids past the vocabulary are padding.
pub(crate) fn load_row(array: &TensorType, parallel: Parallel) -> Result<String, AssembleError> {
    module("load_row", parallel, |builder| {
        builder.main(|f| {
            let (slots, vocab) = (array.dims[0], array.dims[1]);
            let array = f.donated_argument(Shape::new(array.dtype, [(SLOTS, slots), (VOCAB, vocab)]), 0);
            let slot = f.argument(Shape::scalar(DType::I32));
            let entries = [(ENTRIES, LOAD_ENTRIES as u64)];
            let ids = f.argument(Shape::new(DType::I32, entries));
            let values = f.argument(Shape::new(array.dtype(), entries));
            let clear = f.argument(Shape::scalar(DType::I32));
            let origin = [(SLOTS, slot, 1), (VOCAB, f.scalar(DType::I32, 0), vocab)];
            let row = array.dynamic_slice(&origin);
            let zero = f.scalar(row.dtype(), 0);
            let row = clear.ne(0).select(zero, row);
            let row = row.squeeze(SLOTS).scatter(&[(VOCAB, ids)], values, Scatter::set());
            let row = row.reshape(&[(SLOTS, 1), (VOCAB, vocab)]);
            vec![array.dynamic_update_slice(row, &[(SLOTS, slot), (VOCAB, f.scalar(DType::I32, 0))])]
        });
    })
}

/// `(page_table [entries of the table] donated, index [entries], page [entries]) -> page_table`. Indices past the
/// table are padding.
pub(crate) fn load_pages(page_table: &TensorType, parallel: Parallel) -> Result<String, AssembleError> {
    module("load_pages", parallel, |builder| {
        builder.main(|f| {
            let table = f.donated_argument(Shape::new(DType::I32, [(SLOTS, page_table.dims[0])]), 0);
            let entries = [(ENTRIES, LOAD_ENTRIES as u64)];
            let index = f.argument(Shape::new(DType::I32, entries));
            let page = f.argument(Shape::new(DType::I32, entries));
            vec![table.scatter(&[(SLOTS, index)], page, Scatter::set())]
        });
    })
}

fn module(name: &str, parallel: Parallel, build: impl FnOnce(&Builder)) -> Result<String, AssembleError> {
    let builder = Builder::new(name);
    build(&builder);
    let fragment = builder.finish().map_err(|error| AssembleError::Build(error.to_string()))?;
    Ok(torus_hlo::module_text(name, parallel.tensor, &fragment.functions))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Array, run};

    fn padded(values: &[i32], with: i32) -> Array {
        let mut values = values.to_vec();
        values.resize(LOAD_ENTRIES, with);
        Array::i32(&values, &[LOAD_ENTRIES])
    }

    #[test]
    fn a_row_is_cleared_and_its_entries_are_set() {
        let text = load_row(&TensorType::new(DType::I32, [2, 4]), Parallel::default()).unwrap();
        let load = |clear| {
            let array = Array::i32(&[1, 2, 3, 4, 5, 6, 7, 8], &[2, 4]);
            let arguments =
                [array, Array::i32(&[1], &[]), padded(&[3, 0], 4), padded(&[30, 10], 9), Array::i32(&[clear], &[])];
            run(&text, &arguments)[0].to_i32()
        };
        assert_eq!(load(0), [1, 2, 3, 4, 10, 6, 7, 30]);
        assert_eq!(load(1), [1, 2, 3, 4, 10, 0, 0, 30]);
    }

    #[test]
    fn pages_are_set_and_padding_is_dropped() {
        let text = load_pages(&TensorType::new(DType::I32, [4]), Parallel::default()).unwrap();
        let arguments = [Array::i32(&[1, 2, 3, 4], &[4]), padded(&[2, 0], 4), padded(&[7, 9], 5)];
        assert_eq!(run(&text, &arguments)[0].to_i32(), [9, 2, 7, 4]);
    }
}
