//! Activations as 8-bit integers with a scale for each block.

use crate::{level::Level, packed::BLOCK, workspace::Buffer};

/// What a block's elements add up to, times the offsets of weights, negative: of all of them times 128 (and a word of
/// nothing), times 8 and times 16; of the first half times 32, of the second half times 32. A product of integers begins
/// with it. AVX2 adds up in 16 bits: there each is two numbers, of the elements whose columns are 0 or 1 modulo 4 in the
/// lower half of the word, of the others in the upper; and the first two words are both halves' elements times 128, but for
/// multiples of `1 << 16`.
pub(crate) const SUMS: usize = 6;

/// Rows in blocks of [`BLOCK`]: `x = scale * element`, elements from -127 to 127. The scale is the least that keeps them
/// there; or, *bounded*, that also keeps the magnitudes of two neighbours (columns 0 and 1, 2 and 3, …) at 127 together, and
/// at 255 those of the eight that are 0 or 1 modulo 4 in a half of the block, and of the eight others: where one value
/// outweighs its block, as precise; about 1.8 times as coarse where they are normally distributed, 4 times at worst.
#[derive(Default)]
pub struct QuantizedRows {
    blocks: usize,
    bounded: bool,
    /// `[rows, blocks, BLOCK]`
    elements: Buffer<i8>,
    /// `[rows, blocks]`
    scales: Buffer<f32>,
    /// `[rows, blocks]`, what minimums are multiplied with: the sum of the elements times the scale.
    scaled_sums: Buffer<f32>,
    /// `[rows, blocks, SUMS]`
    offset_sums: Buffer<i32>,
}

impl QuantizedRows {
    pub fn new(rows: usize, columns: usize, bounded: bool) -> Self {
        let blocks = columns / BLOCK;
        Self {
            blocks,
            bounded,
            elements: Buffer::take(rows * blocks * BLOCK),
            scales: Buffer::take(rows * blocks),
            scaled_sums: Buffer::take(rows * blocks),
            offset_sums: Buffer::take(rows * blocks * SUMS),
        }
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn elements(&self) -> &[i8] {
        &self.elements
    }

    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    pub fn scaled_sums(&self) -> &[f32] {
        &self.scaled_sums
    }

    pub fn offset_sums(&self) -> &[i32] {
        &self.offset_sums
    }

    /// Quantizes whole blocks of a row, from block `block` on.
    ///
    /// # Safety
    /// No other thread reads or writes these blocks of the row meanwhile.
    pub unsafe fn put(&self, level: Level, row: usize, block: usize, values: &[f32]) {
        let (values, rest) = values.as_chunks::<BLOCK>();
        let first = row * self.blocks + block;
        assert!(rest.is_empty() && block + values.len() <= self.blocks, "whole blocks of a row");
        assert!(first + values.len() <= self.scales.len(), "a row that is there");
        let len = values.len();
        // SAFETY: the blocks are within all buffers, which have room for the same rows, and the caller owns them.
        let mut blocks = unsafe {
            let elements = self.elements.as_shared_ptr().add(first * BLOCK).cast();
            let offset_sums = self.offset_sums.as_shared_ptr().add(first * SUMS).cast();
            Blocks {
                elements: std::slice::from_raw_parts_mut(elements, len),
                scales: std::slice::from_raw_parts_mut(self.scales.as_shared_ptr().add(first), len),
                scaled_sums: std::slice::from_raw_parts_mut(self.scaled_sums.as_shared_ptr().add(first), len),
                offset_sums: std::slice::from_raw_parts_mut(offset_sums, len),
            }
        };
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the level is available.
            Level::Avx512 | Level::Avx512Bf16 | Level::Amx => unsafe { quantize_avx512(values, &mut blocks) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 if self.bounded => unsafe { quantize_avx2::<true>(values, &mut blocks) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { quantize_avx2::<false>(values, &mut blocks) },
            _ => quantize(values, &mut blocks),
        }
    }
}

/// Where some blocks go.
struct Blocks<'a> {
    elements: &'a mut [[i8; BLOCK]],
    scales: &'a mut [f32],
    scaled_sums: &'a mut [f32],
    offset_sums: &'a mut [[i32; SUMS]],
}

impl Blocks<'_> {
    /// Takes the scale of a block, and the sums of the elements of both halves.
    #[inline(always)]
    fn note(&mut self, block: usize, scale: f32, sums: [i32; 2]) {
        let sum = sums[0] + sums[1];
        self.scales[block] = scale;
        self.scaled_sums[block] = scale * sum as f32;
        self.offset_sums[block] = [-128 * sum, 0, -8 * sum, -16 * sum, -32 * sums[0], -32 * sums[1]];
    }
}

/// Below this the inverse would be infinite.
#[cfg(target_arch = "x86_64")]
const SMALLEST: f32 = 127.0 / f32::MAX;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_avx2<const BOUNDED: bool>(values: &[[f32; BLOCK]], blocks: &mut Blocks<'_>) {
    use std::arch::x86_64::*;
    /// Half the mean magnitude of eight elements, at most, which all of one size reach exactly: with what rounding adds to
    /// others, they are 252 together.
    const EIGHT: f32 = 0.5 * 31.0;
    /// That of two, which are not both rounded up to 128 together.
    const TWO: f32 = 0.5 * 63.499;
    let most = if BOUNDED { EIGHT } else { 127.0 };
    let magnitude = _mm256_set1_epi32(i32::MAX);
    // Half the means of neighbours, times the other bound by their own, to be compared with means of eights. (Means would be
    // rounded to what is not finite where all values are the largest that are.)
    let part = _mm256_set1_ps(0.25 * EIGHT / TWO);
    let means = |magnitudes: __m256i| {
        let values = _mm256_mul_ps(_mm256_castsi256_ps(magnitudes), part);
        _mm256_add_ps(values, _mm256_permute_ps::<0b10_11_00_01>(values))
    };
    // Half the means of the eights of half a block, from its two quarters' neighbours.
    let quarter = _mm256_set1_ps(0.25 * TWO / EIGHT);
    let means_of_means = |a: __m256, b: __m256| {
        let values = _mm256_mul_ps(_mm256_add_ps(a, b), quarter);
        _mm256_add_ps(values, _mm256_permute2f128_ps::<1>(values, values))
    };
    for (block, values) in values.iter().enumerate() {
        // SAFETY: all four are in the block.
        let quarters: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(values.as_ptr().add(i * 8)) });
        // As integers, magnitudes have the same order, and what is not finite is above all others.
        let magnitudes = quarters.map(|values| _mm256_and_si256(_mm256_castps_si256(values), magnitude));
        let highest = |[a, b, c, d]: [__m256i; 4]| _mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d));
        let eight = if BOUNDED {
            let twos = magnitudes.map(means);
            let eights = [means_of_means(twos[0], twos[1]), means_of_means(twos[2], twos[3])];
            let [first, second] = eights.map(|means| _mm256_castps_si256(means));
            _mm256_max_epu32(highest(twos.map(|means| _mm256_castps_si256(means))), _mm256_max_epu32(first, second))
        } else {
            highest(magnitudes)
        };
        let four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
        let largest = f32::from_bits(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_srli_epi64::<32>(two))) as u32);
        if !largest.is_finite() {
            blocks.elements[block] = [0; BLOCK];
            blocks.note(block, f32::NAN, [0; 2]);
            continue;
        }
        let inverse = _mm256_set1_ps(if largest > SMALLEST { most / largest } else { 0.0 });
        let [a, b, c, d] = quarters.map(|values| _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse)));
        let mixed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let elements = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        // SAFETY: a block has so many bytes.
        unsafe { _mm256_storeu_si256(blocks.elements[block].as_mut_ptr().cast(), elements) };
        // Sums of columns 0 and 1, and of 2 and 3, of each four, in both halves of the block.
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), elements);
        let twos = _mm256_add_epi16(pairs, _mm256_srli_si256::<8>(pairs));
        let sums = _mm256_add_epi16(twos, _mm256_srli_si256::<4>(twos));
        let (first, second) = (_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let both = _mm_add_epi16(first, second);
        let sum = _mm_cvtsi128_si32(_mm_madd_epi16(both, _mm_set1_epi16(1)));
        let halves = _mm_unpacklo_epi32(first, second);
        let words = _mm_unpacklo_epi64(halves, _mm_shuffle_epi32::<0>(both));
        let factors = _mm_setr_epi16(-128, -128, -128, -128, -8, -8, -16, -16);
        // SAFETY: so many words are kept of a block.
        unsafe {
            let to = blocks.offset_sums[block].as_mut_ptr();
            _mm_storeu_si128(to.cast(), _mm_mullo_epi16(words, factors));
            _mm_storel_epi64(to.add(4).cast(), _mm_mullo_epi16(halves, _mm_set1_epi16(-32)));
        }
        blocks.scales[block] = largest / most;
        blocks.scaled_sums[block] = largest / most * sum as f32;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_avx512(values: &[[f32; BLOCK]], blocks: &mut Blocks<'_>) {
    let mut block = 0;
    while let rest @ [_, ..] = &values[block..] {
        block += if rest.first_chunk::<4>().is_some_and(|four| quantize_some(four, block, blocks)) {
            4
        } else if rest.first_chunk::<2>().is_some_and(|two| quantize_some(two, block, blocks)) {
            2
        } else {
            quantize_one_avx512(&rest[0], block, blocks);
            1
        };
    }
}

/// Two or four blocks, whose maximums and sums are found together. Gives false, and does nothing, if a value is not finite.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_some<const N: usize>(values: &[[f32; BLOCK]; N], block: usize, blocks: &mut Blocks<'_>) -> bool {
    use std::arch::x86_64::*;
    const { assert!(N == 2 || N == 4) };
    let load = |block: usize, half: usize| {
        // SAFETY: both halves are in the block.
        unsafe { _mm512_loadu_ps(values[block].as_ptr().add(half * 16)) }
    };
    let mut largest = [_mm512_setzero_si512(); 4];
    for (block, largest) in largest.iter_mut().enumerate().take(N) {
        // As integers, magnitudes have the same order, and what is not finite is above all others.
        let magnitudes = [0, 1].map(|half| _mm512_castps_si512(_mm512_abs_ps(load(block, half))));
        *largest = _mm512_max_epi32(magnitudes[0], magnitudes[1]);
    }
    let pair = |a, b| _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (first, second) = (pair(largest[0], largest[1]), pair(largest[2], largest[3]));
    let lanes = _mm512_max_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    let two = _mm256_max_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64::<1>(lanes));
    let largest = _mm_max_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256::<1>(two));
    if _mm_cmpge_epi32_mask(largest, _mm_set1_epi32(f32::INFINITY.to_bits() as i32)) != 0 {
        return false;
    }
    let (largest, most) = (_mm_castsi128_ps(largest), _mm_set1_ps(127.0));
    let scales = _mm_div_ps(largest, most);
    let is_enough = _mm_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm_set1_ps(SMALLEST));
    let inverses = _mm512_castps128_ps512(_mm_maskz_div_ps(is_enough, most, largest));
    let mut elements = [_mm512_setzero_si512(); 2];
    for (pair, elements) in elements.iter_mut().enumerate().take(N / 2) {
        let mut words = [_mm512_setzero_si512(); 2];
        for (index, words) in words.iter_mut().enumerate() {
            let block = pair * 2 + index;
            let inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(block as i32), inverses);
            let halves = [0, 1].map(|half| _mm512_cvtps_epi32(_mm512_mul_ps(load(block, half), inverse)));
            *words = _mm512_packs_epi32(halves[0], halves[1]);
        }
        // In each quarter of the register: four columns of the first half, of the second, and of both of the other block.
        let mixed = _mm512_packs_epi16(words[0], words[1]);
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        *elements = _mm512_permutexvar_epi32(order, mixed);
        // SAFETY: two blocks have so many bytes.
        unsafe { _mm512_storeu_si512(blocks.elements[block + pair * 2..][..2].as_mut_ptr().cast(), *elements) };
    }
    // Sums of fours of columns, a half of a block in each quarter; then the halves' of blocks 0 and 2, and of 1 and 3.
    let [first, second] =
        elements.map(|elements| _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), elements));
    let twos = _mm512_add_epi32(_mm512_unpacklo_epi32(first, second), _mm512_unpackhi_epi32(first, second));
    let halves = _mm512_add_epi32(twos, _mm512_shuffle_epi32::<0b01_00_11_10>(twos));
    // The first halves of all blocks, then the second ones.
    let order = _mm512_setr_epi32(0, 8, 1, 9, 4, 12, 5, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    let ordered = _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, halves));
    let (first, second) = (_mm256_castsi256_si128(ordered), _mm256_extracti128_si256::<1>(ordered));
    let sums = _mm_add_epi32(first, second);
    let scaled_sums = _mm_mul_ps(scales, _mm_cvtepi32_ps(sums));
    // SAFETY: there is room for so many blocks from this one on.
    unsafe {
        let these = const { (1 << N) - 1 };
        _mm_mask_storeu_ps(blocks.scales[block..][..N].as_mut_ptr(), these, scales);
        _mm_mask_storeu_ps(blocks.scaled_sums[block..][..N].as_mut_ptr(), these, scaled_sums);
    }
    let negative = _mm_sub_epi32(_mm_setzero_si128(), sums);
    let halves = [_mm_unpacklo_epi32(first, second), _mm_unpackhi_epi32(first, second)];
    let negative_halves = halves.map(|both| _mm_slli_epi32::<5>(_mm_sub_epi32(_mm_setzero_si128(), both)));
    // Each block's sum four times, times 128, nothing, 8 and 16.
    let index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    let shifts = _mm512_setr_epi32(7, 0, 3, 4, 7, 0, 3, 4, 7, 0, 3, 4, 7, 0, 3, 4);
    let four_times = _mm512_permutexvar_epi32(index, _mm512_castsi128_si512(negative));
    let multiples = _mm512_maskz_sllv_epi32(0b1101_1101_1101_1101, four_times, shifts);
    let quarters = [
        _mm512_castsi512_si128(multiples),
        _mm512_extracti32x4_epi32::<1>(multiples),
        _mm512_extracti32x4_epi32::<2>(multiples),
        _mm512_extracti32x4_epi32::<3>(multiples),
    ];
    for (index, quarter) in quarters.into_iter().enumerate().take(N) {
        let both = negative_halves[index / 2];
        // SAFETY: so many words are kept of a block.
        unsafe {
            let to = blocks.offset_sums[block + index].as_mut_ptr();
            _mm_storeu_si128(to.cast(), quarter);
            _mm_storel_epi64(to.add(4).cast(), if index % 2 == 0 { both } else { _mm_unpackhi_epi64(both, both) });
        }
    }
    true
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize_one_avx512(values: &[f32; BLOCK], block: usize, blocks: &mut Blocks<'_>) {
    use std::arch::x86_64::*;
    // SAFETY: both halves are in the block.
    let halves = unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))] };
    // Classes of what is not finite: both kinds of what is not a number, and both infinities.
    let odd = _mm512_fpclass_ps_mask::<0x99>(halves[0]) | _mm512_fpclass_ps_mask::<0x99>(halves[1]);
    if odd != 0 {
        blocks.elements[block] = [0; BLOCK];
        blocks.note(block, f32::NAN, [0; 2]);
        return;
    }
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(halves[0]), _mm512_abs_ps(halves[1])));
    let inverse = _mm512_set1_ps(if largest > SMALLEST { 127.0 / largest } else { 0.0 });
    let [low, high] = halves.map(|values| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse))));
    let elements = _mm256_set_m128i(high, low);
    // SAFETY: a block has so many bytes.
    unsafe { _mm256_storeu_si256(blocks.elements[block].as_mut_ptr().cast(), elements) };
    let fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), elements);
    let twos = _mm_hadd_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256::<1>(fours));
    let sums = _mm_cvtsi128_si64(_mm_hadd_epi32(twos, twos));
    blocks.note(block, largest / 127.0, [sums as i32, (sums >> 32) as i32]);
}

#[inline(always)]
fn quantize(values: &[[f32; BLOCK]], blocks: &mut Blocks<'_>) {
    for (block, values) in values.iter().enumerate() {
        let (scale, sums) = quantize_block(values, &mut blocks.elements[block]);
        blocks.note(block, scale, sums);
    }
}

/// Gives the scale, and the sums of the elements of both halves.
#[inline(always)]
fn quantize_block(values: &[f32; BLOCK], elements: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // Adding this rounds a small number to an integer, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // `nothing` is zero, unless there is a value that is not finite: then it makes the scale not a number.
    let (mut largest, mut nothing) = ([0.0f32; 8], [0.0f32; 8]);
    for part in values.as_chunks::<8>().0 {
        for ((largest, nothing), value) in largest.iter_mut().zip(&mut nothing).zip(part) {
            *largest = largest.max(value.abs());
            *nothing += value * 0.0;
        }
    }
    let largest = largest.iter().fold(0.0f32, |a, b| a.max(*b)) + nothing.iter().sum::<f32>();
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    // The inverse of a number below the smallest normal one may be infinite.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sums = [0; 2];
    let halves = values.as_chunks::<16>().0.iter().zip(elements.as_chunks_mut::<16>().0);
    for (sum, (values, elements)) in sums.iter_mut().zip(halves) {
        for (value, element) in values.iter().zip(elements) {
            *element = ((value * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) as i8;
            *sum += i32::from(*element);
        }
    }
    (largest / 127.0, sums)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn values_are_off_by_half_a_step_at_most() {
        let rng = &mut ChaCha8Rng::seed_from_u64(5);
        for (level, bounded) in Level::available().flat_map(|level| [(level, false), (level, true)]) {
            let rows = QuantizedRows::new(2, 96, bounded);
            let values: Vec<f32> = (0..96).map(|k| rng.random_range(-3.0..3.0f32) * (k / 32) as f32).collect();
            // SAFETY: there is one thread.
            unsafe { rows.put(level, 1, 0, &values) };
            for (k, value) in values.iter().enumerate() {
                let (element, scale) = (rows.elements()[96 + k], rows.scales()[3 + k / 32]);
                assert!((f32::from(element) * scale - value).abs() <= scale * 0.5001, "{level} {k}");
            }
            let is_bounded = rows.elements()[96..].as_chunks().0.iter().all(fits_16_bits);
            assert_eq!(bounded && level == Level::Avx2, is_bounded, "{level}");
            for block in 3..6 {
                let sum = |part: std::ops::Range<usize>| -> i32 {
                    rows.elements()[block * 32..][part].iter().map(|e| i32::from(*e)).sum()
                };
                let expected = [-8 * sum(0..32), -16 * sum(0..32), -32 * sum(0..16), -32 * sum(16..32)];
                let (eights, found) = rows.offset_sums()[block * SUMS..][..SUMS].split_at(2);
                let halves = |word: &i32| [*word as i16, (word >> 16) as i16];
                match level {
                    Level::Avx2 => {
                        let words = found.iter().map(|word| halves(word).into_iter().map(i32::from).sum::<i32>());
                        assert_eq!(words.collect::<Vec<_>>(), expected);
                        for (half, word) in eights.iter().enumerate() {
                            let fours = (0..16).step_by(4).map(|k| half * 16 + k);
                            let eight = |at: usize| fours.clone().map(|k| sum(k + at..k + at + 2)).sum::<i32>();
                            let expected = [0, 2].map(|at| (-128 * eight(at)) as i16);
                            assert_eq!(halves(word), expected);
                        }
                    }
                    _ => {
                        assert_eq!(found, expected);
                        assert_eq!(eights, [-128 * sum(0..32), 0]);
                    }
                }
                assert_eq!(rows.scaled_sums()[block], rows.scales()[block] * sum(0..32) as f32);
            }
            // SAFETY: as above.
            unsafe { rows.put(level, 0, 2, &[f32::MAX; 32]) };
            assert!(rows.scales()[2].is_finite(), "{level}");
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                // SAFETY: as above.
                unsafe { rows.put(level, 0, 1, &[&values[..31], &[odd]].concat()) };
                assert!(rows.scales()[1].is_nan(), "{level} {odd}");
            }
        }
    }

    /// Blocks are taken by fours where there are so many, then by two, and one by one at the end.
    #[test]
    fn blocks_are_the_same_together_and_alone() {
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let mut values: Vec<f32> = (0..11 * BLOCK)
            .map(|k| rng.random_range(-1.0..1.0f32) * 10f32.powi((k / BLOCK % 4) as i32 * 8 - 16))
            .collect();
        values[BLOCK..2 * BLOCK].fill(0.0);
        values[2 * BLOCK..3 * BLOCK].fill(1e-39);
        values[9 * BLOCK + 3] = f32::INFINITY;
        for level in Level::available() {
            let [together, alone] = [0; 2].map(|_| QuantizedRows::new(1, values.len(), false));
            // SAFETY: there is one thread.
            unsafe { together.put(level, 0, 0, &values) };
            for (block, values) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
                // SAFETY: as above.
                unsafe { alone.put(level, 0, block, values) };
            }
            assert_eq!(together.elements(), alone.elements(), "{level}");
            assert_eq!(together.offset_sums(), alone.offset_sums(), "{level}");
            let bits = |scales: &[f32]| scales.iter().map(|scale| scale.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(together.scales()), bits(alone.scales()), "{level}");
            assert_eq!(bits(together.scaled_sums()), bits(alone.scaled_sums()), "{level}");
            assert!(alone.scales()[9].is_nan() && alone.scales()[1] == 0.0, "{level}");
        }
    }

    /// Whether the magnitudes in a block add up to what a product in 16 bits can take, of any weights.
    fn fits_16_bits(block: &[i8; BLOCK]) -> bool {
        let sum = |columns: &mut dyn Iterator<Item = usize>| columns.map(|k| u32::from(block[k].unsigned_abs())).sum();
        let twos = (0..BLOCK).step_by(2).map(|k| sum(&mut (k..k + 2)));
        let eights = [0, 2, 16, 18].map(|at| sum(&mut (0..16).step_by(4).flat_map(|k| [at + k, at + k + 1])));
        twos.max().is_some_and(|two: u32| two <= 127) && eights.iter().all(|eight: &u32| *eight <= 255)
    }

    /// Values that are all of one size, or one that outweighs the others, of any size.
    #[test]
    fn bounded_blocks_fit_16_bits_whatever_they_hold() {
        let rng = &mut ChaCha8Rng::seed_from_u64(6);
        for round in 0..2000 {
            let (size, power) = (10f32.powi(rng.random_range(-30..30)), rng.random_range(0..8));
            let values: Vec<f32> = (0..BLOCK).map(|_| rng.random_range(-1.0..1.0f32).powi(power) * size).collect();
            for level in Level::available() {
                let rows = QuantizedRows::new(1, BLOCK, true);
                // SAFETY: there is one thread.
                unsafe { rows.put(level, 0, 0, &values) };
                let fits = rows.elements().as_chunks().0.iter().all(fits_16_bits);
                assert!(fits || level != Level::Avx2, "{level} {round} {values:?}");
            }
        }
    }
}
