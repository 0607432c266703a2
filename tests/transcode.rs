//! Layouts of other projects: bytes worked out by hand from their published definitions, round
//! trips within half a step, lengths that do not fit.

#[allow(dead_code)]
mod random;

use kvcache::dtype::f16;
use kvcache::quant::transcode::{
    Kivi, from_q4_0, from_q8_0, from_vllm_int4, from_vllm_int8, to_q4_0, to_q8_0, to_vllm_int4,
    to_vllm_int8,
};
use random::Rng;

/// 32 elements: `first`, then zeros.
fn block(first: &[f32]) -> Vec<f32> {
    let mut row = vec![0.0; 32];
    row[..first.len()].copy_from_slice(first);
    row
}

#[test]
fn ggml_blocks_by_hand() {
    let row = block(&[127.0, -127.0, 63.5, -0.5, 0.49]);
    let mut bytes = [0xa5; 34];
    to_q8_0(&row, &mut bytes).unwrap();
    // Scale 1.0; halves round away from zero.
    assert_eq!(bytes[..7], [0x00, 0x3c, 127, 0x81, 64, 0xff, 0]);
    let mut back = block(&[]);
    from_q8_0(&bytes, &mut back).unwrap();
    assert_eq!(back[..5], [127.0, -127.0, 64.0, -1.0, 0.0]);

    // The farthest element is negative: it becomes code 0 of scale 1.
    let mut row = block(&[-8.0, 7.0, 7.6, 0.0]);
    row[16] = 1.0;
    row[18] = -3.4;
    let mut bytes = [0xa5; 18];
    to_q4_0(&row, &mut bytes).unwrap();
    assert_eq!(bytes[..6], [0x00, 0x3c, 9 << 4, 8 << 4 | 15, 5 << 4 | 15, 8 << 4 | 8]);
    from_q4_0(&bytes, &mut back).unwrap();
    assert_eq!((back[0], back[1], back[2], back[16], back[18]), (-8.0, 7.0, 7.0, 1.0, -3.0));
    // A positive farthest element makes the scale negative.
    to_q4_0(&block(&[8.0]), &mut bytes).unwrap();
    assert_eq!(bytes[..3], [0x00, 0xbc, 8 << 4]);
}

#[test]
fn vllm_rows_by_hand() {
    let mut bytes = [0; 8];
    to_vllm_int8(&[1.27, -1.27, 0.634, 0.0], &mut bytes).unwrap();
    assert_eq!(bytes[..4], [127, 0x81, 63, 0]);
    let scale = f32::from_le_bytes(bytes[4..].try_into().unwrap());
    assert!(!((scale - 0.01).abs() > 1e-8));

    let mut bytes = [0; 6];
    // Scale 1, zero point 5.
    to_vllm_int4(&[-5.0, 10.0, 0.4, 2.6], &mut bytes).unwrap();
    assert_eq!(bytes[..2], [15 << 4, 8 << 4 | 5]);
    let bits = u32::from_le_bytes(bytes[2..].try_into().unwrap());
    assert_eq!(bits, 1f32.to_bits() | 5);
    let mut back = [0.0; 4];
    from_vllm_int4(&bytes, &mut back).unwrap();
    assert_eq!(back, [-5.0, 10.0, 0.0, 3.0]);
}

#[test]
fn kivi_rows_by_hand() {
    let kivi = Kivi::new(2, 16).unwrap();
    let row: Vec<f32> = (0..32).map(|at| (at % 4 * (1 + at / 16)) as f32 - 1.0).collect();
    let (mut words, mut scales, mut mins) = ([0; 2], [f16::ZERO; 2], [f16::ZERO; 2]);
    kivi.encode(&row, &mut words, &mut scales, &mut mins).unwrap();
    // Codes 0, 1, 2, 3 from the lowest bits up.
    assert_eq!(words, [0xe4e4_e4e4; 2]);
    assert_eq!(scales.map(f16::to_f32), [1.0, 2.0]);
    assert_eq!(mins.map(f16::to_f32), [-1.0, -1.0]);
    let mut back = vec![0.0; 32];
    kivi.decode(&words, &scales, &mins, &mut back).unwrap();
    assert_eq!(back, row);
}

#[test]
fn rows_come_back_within_half_a_step() {
    let mut rng = Rng::new(3);
    for round in 0..50 {
        let size = [0.0, 1e-3, 1.0, 300.0][round % 4];
        let row: Vec<f32> = (0..128).map(|_| rng.normal() * size).collect();
        let largest = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let near = |back: &[f32], step: f32| {
            // The step as f16, and f32's rounding of the products.
            let bound = 0.51 * step + 2e-3 * largest + 1e-6;
            row.iter().zip(back).all(|(x, y)| !((x - y).abs() > bound))
        };
        let mut back = vec![f32::NAN; 128];
        let mut bytes = vec![0; 136];
        to_q8_0(&row, &mut bytes).unwrap();
        from_q8_0(&bytes, &mut back).unwrap();
        assert!(near(&back, largest / 127.0));
        let mut bytes = vec![0; 72];
        to_q4_0(&row, &mut bytes).unwrap();
        from_q4_0(&bytes, &mut back).unwrap();
        // An element as far on the other side is one step past the last code.
        assert!(near(&back, largest / 4.0));
        let mut bytes = vec![0; 132];
        to_vllm_int8(&row, &mut bytes).unwrap();
        from_vllm_int8(&bytes, &mut back).unwrap();
        assert!(near(&back, largest / 127.0));
        let mut bytes = vec![0; 68];
        to_vllm_int4(&row, &mut bytes).unwrap();
        from_vllm_int4(&bytes, &mut back).unwrap();
        // The rounded zero point moves the range by up to half a step.
        assert!(near(&back, 2.0 * 2.0 * largest / 15.0));
        for bits in [2, 4, 8] {
            let kivi = Kivi::new(bits, 32).unwrap();
            let mut words = vec![0; 128 * bits as usize / 32];
            let (mut scales, mut mins) = ([f16::ZERO; 4], [f16::ZERO; 4]);
            kivi.encode(&row, &mut words, &mut scales, &mut mins).unwrap();
            kivi.decode(&words, &scales, &mins, &mut back).unwrap();
            assert!(near(&back, 2.0 * largest / ((1 << bits) - 1) as f32), "{bits}");
        }
    }
}

#[test]
fn lengths_and_elements_are_checked() {
    let (row, bad) = (vec![0.0; 32], block(&[f32::NAN]));
    assert!(to_q8_0(&row[1..], &mut [0; 34]).is_err());
    assert!(to_q8_0(&row, &mut [0; 33]).is_err());
    assert!(to_q8_0(&bad, &mut [0; 34]).is_err());
    assert!(from_q4_0(&[0; 17], &mut [0.0; 32]).is_err());
    assert!(to_q4_0(&bad, &mut [0; 18]).is_err());
    assert!(to_vllm_int8(&row, &mut [0; 35]).is_err());
    assert!(from_vllm_int8(&[0; 35], &mut [0.0; 32]).is_err());
    assert!(to_vllm_int4(&row[1..], &mut [0; 19]).is_err());
    assert!(to_vllm_int4(&[], &mut [0; 4]).is_err());
    assert!(from_vllm_int4(&[0; 20], &mut [0.0; 30]).is_err());
    for (bits, group) in [(3, 32), (0, 32), (4, 0), (4, 24)] {
        assert!(Kivi::new(bits, group).is_err());
    }
    let kivi = Kivi::new(4, 32).unwrap();
    let mut one = [f16::ZERO];
    assert!(kivi.encode(&row, &mut [0; 3], &mut one.clone(), &mut one).is_err());
    assert!(kivi.encode(&bad, &mut [0; 4], &mut one.clone(), &mut one).is_err());
    assert!(kivi.decode(&[0; 4], &one, &[], &mut [0.0; 32]).is_err());
}
