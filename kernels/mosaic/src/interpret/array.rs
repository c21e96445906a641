//! Tensors on the host: what kernels are run with and what they yield.

use crate::{interpret::number, types::Tensor};

/// A tensor in row-major order. Parts of it may be undefined: nothing that matters may depend on them.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub tensor: Tensor,
    /// One word an element, as `interpret/number.rs` describes.
    pub(super) lanes: Vec<u32>,
    /// For each element whether it is undefined; empty if none is.
    pub(super) undefined: Vec<bool>,
}

impl Array {
    /// Numbers, rounded to a float type.
    ///
    /// # Panics
    /// If there are not as many as the tensor has elements, or if it holds integers.
    pub fn from_f32(tensor: Tensor, numbers: &[f32]) -> Self {
        assert_eq!(tensor.elements(), numbers.len(), "elements of {tensor}");
        assert!(tensor.elem.is_float(), "{tensor} holds no floats");
        let lanes = numbers.iter().map(|number| number::from_f32(tensor.elem, *number)).collect();
        Self { tensor, lanes, undefined: Vec::new() }
    }

    /// Integers; what does not fit is cut off.
    ///
    /// # Panics
    /// If there are not as many as the tensor has elements, or if it holds floats.
    pub fn from_i32(tensor: Tensor, numbers: &[i32]) -> Self {
        assert_eq!(tensor.elements(), numbers.len(), "elements of {tensor}");
        assert!(tensor.elem.is_int(), "{tensor} holds no integers");
        let unused = 32 - tensor.elem.bits();
        let lanes = numbers.iter().map(|number| ((number << unused) >> unused) as u32).collect();
        Self { tensor, lanes, undefined: Vec::new() }
    }

    pub fn zeros(tensor: Tensor) -> Self {
        Self { lanes: vec![0; tensor.elements()], undefined: Vec::new(), tensor }
    }

    /// Marks elements as undefined: pages that nobody wrote, rows behind the end. Where they hold floats they become NaN,
    /// so that even what is not tracked shows.
    pub fn undefine(&mut self, elements: impl IntoIterator<Item = usize>) {
        self.undefined.resize(self.lanes.len(), false);
        for element in elements {
            self.undefined[element] = true;
            self.lanes[element] = number::decode(self.tensor.elem, u32::MAX, 0);
        }
    }

    /// Whether an element (by its row-major number) depends on nothing undefined.
    pub fn is_defined(&self, element: usize) -> bool {
        !self.undefined.get(element).copied().unwrap_or(false)
    }

    /// How many elements are undefined.
    pub fn undefined_elements(&self) -> usize {
        self.undefined.iter().filter(|undefined| **undefined).count()
    }

    /// The numbers of a float or integer tensor as floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let elem = self.tensor.elem;
        match elem.is_float() {
            true => self.lanes.iter().map(|lane| number::to_f32(elem, *lane)).collect(),
            false => self.lanes.iter().map(|lane| *lane as i32 as f32).collect(),
        }
    }

    /// The numbers of an integer tensor; of a float tensor, the bits as `interpret/number.rs` describes.
    pub fn to_i32(&self) -> Vec<i32> {
        self.lanes.iter().map(|lane| *lane as i32).collect()
    }
}
