//! Memory, batches and stores refuse what does not fit; on the emulator.

use alloc::vec;

use super::*;
use crate::dtype::{KvFormat, Rows};
use crate::ids::BlockId;
use crate::layout::{GroupLayout, GroupSpec};

fn emu() -> Arc<dyn Backend> {
    open(Device::Emu).unwrap()
}

#[test]
fn devices_are_named() {
    assert_eq!(Device::from_name("cpu"), Ok(Device::Cpu));
    assert_eq!(Device::from_name("cuda"), Ok(Device::Cuda { ordinal: 0 }));
    assert_eq!(Device::from_name("cuda:3"), Ok(Device::Cuda { ordinal: 3 }));
    assert_eq!(Device::from_name("emu"), Ok(Device::Emu));
    for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
        assert!(Device::from_name(bad).is_err(), "{bad}");
    }
    assert!(matches!(open(Device::Cpu), Err(Error::InvalidArgument { .. })));
}

#[test]
fn memory_is_checked_against_its_size() {
    let backend = emu();
    let mut memory = DeviceMemory::new(&backend, 100).unwrap();
    assert_eq!(memory.address() % 256, 0);
    memory.upload(90, &[7; 10], Stream::DEFAULT).unwrap();
    let mut read = [0; 10];
    memory.download(90, &mut read, Stream::DEFAULT).unwrap();
    assert_eq!(read, [7; 10]);
    memory.zero(Stream::DEFAULT).unwrap();
    memory.download(90, &mut read, Stream::DEFAULT).unwrap();
    assert_eq!(read, [0; 10]);
    assert!(memory.upload(91, &[7; 10], Stream::DEFAULT).is_err());
    assert!(memory.download(u64::MAX, &mut read, Stream::DEFAULT).is_err());
    memory.grow(50).unwrap();
    assert_eq!(memory.bytes(), 100);
    memory.grow(101).unwrap();
    assert_eq!(memory.bytes(), 200);
    assert!(memory.is_on(&backend) && !memory.is_on(&emu()));
    // Addresses that nobody allocated are no memory of an emulator.
    // SAFETY: refused before anything is touched.
    assert!(unsafe { backend.zero(memory.address(), 1 << 20, Stream::DEFAULT) }.is_err());
}

#[test]
fn a_batch_must_fit_together() {
    let backend = emu();
    let mut batch = DeviceBatch::default();
    assert!(matches!(batch.view(0), Err(Error::InvalidState { .. })));
    let good = BatchTables { q_indptr: &[0, 2, 3], kv_lens: &[2, 20] };
    let tables = GroupTables { indptr: &[0, 1, 3], indices: &[4, 5, 6], slots: &[64, 65, 99] };
    let mut put = |lens: BatchTables, tables: GroupTables| {
        batch.upload(&backend, Stream::DEFAULT, &lens, [tables].into_iter())
    };
    for bad in [&[0, 2][..], &[1, 2, 3], &[0, 3, 2]] {
        assert!(put(BatchTables { q_indptr: bad, ..good }, tables).is_err());
    }
    for bad in [
        GroupTables { indptr: &[0, 1], ..tables },
        GroupTables { indptr: &[0, 2, 1], ..tables },
        GroupTables { indices: &[4, 5], ..tables },
        GroupTables { slots: &[64], ..tables },
    ] {
        assert!(put(good, bad).is_err());
    }
    put(good, tables).unwrap();
    let view = batch.view(0).unwrap();
    assert_eq!((view.seqs, view.rows, view.max_q, view.max_kv), (2, 3, 2, 20));
    assert!(batch.view(1).is_err());
    // What fails leaves no batch behind.
    let bad = BatchTables { q_indptr: &[0, 2], ..good };
    assert!(batch.upload(&backend, Stream::DEFAULT, &bad, [tables].into_iter()).is_err());
    assert!(matches!(batch.view(0), Err(Error::InvalidState { .. })));
}

#[test]
fn a_store_refuses_what_does_not_fit() {
    let backend = emu();
    let layout = |dim, format| GroupLayout::new(GroupSpec::uniform(2, 1, dim, format), 16).unwrap();
    let store = |layout| DeviceStore::new(&backend, layout, 4, StoreOptions::default());
    for bad in [layout(72, KvFormat::F16), layout(64, KvFormat::F32)] {
        assert!(matches!(store(bad), Err(Error::Unsupported { .. })));
    }
    let mut store = store(layout(64, KvFormat::F16)).unwrap();
    let block = |id| BlockId(id);
    assert_eq!(store.copy_tokens(block(0), block(4), 1), Err(Error::BadBlock { block: 4 }));
    assert!(store.copy_tokens(block(0), block(1), 17).is_err());
    assert!(store.copy_tokens(block(0), block(1), 16).is_ok());
    let mut batch = DeviceBatch::default();
    let row = vec![0f32; 64];
    let rows = || Rows::F32(&row);
    assert!(store.append(0, &batch, 0, rows(), rows(), None).is_err(), "no batch");
    let lens = BatchTables { q_indptr: &[0, 1], kv_lens: &[1] };
    let tables = GroupTables { indptr: &[0, 1], indices: &[0], slots: &[0] };
    batch.upload(&backend, Stream::DEFAULT, &lens, [tables].into_iter()).unwrap();
    assert!(store.append(0, &batch, 0, rows(), rows(), None).is_ok());
    assert!(store.append(2, &batch, 0, rows(), rows(), None).is_err(), "no such layer");
    assert!(store.append(0, &batch, 1, rows(), rows(), None).is_err(), "no such group");
    assert!(store.reserve_scratch(1).is_err(), "a format without sealed tiles");
    assert!(store.copy_raw(block(0), block(0), 1).is_err());
    let short = Rows::F32(&row[..56]);
    assert!(store.append(0, &batch, 0, short, rows(), None).is_err());
    assert!(store.append(0, &batch, 0, rows(), short, None).is_err());
    assert_eq!(store.sync(), Ok(()));
}

#[test]
fn a_store_of_sealed_tiles_refuses_what_does_not_fit() {
    let backend = emu();
    let layout = |dim, tokens| {
        GroupLayout::new(GroupSpec::uniform(2, 1, dim, KvFormat::Kt4v4), tokens).unwrap()
    };
    let options = StoreOptions { staging_blocks: 2, ..StoreOptions::default() };
    for bad in [layout(64, 32), layout(96, 64)] {
        let refused = DeviceStore::new(&backend, bad, 4, options);
        assert!(matches!(refused, Err(Error::Unsupported { .. })));
    }
    let mut store = DeviceStore::new(&backend, layout(64, 64), 4, options).unwrap();
    assert_eq!(store.copy_raw(BlockId(0), BlockId(2), 1), Err(Error::BadBlock { block: 2 }));
    assert!(store.copy_raw(BlockId(0), BlockId(1), 65).is_err());
    assert_eq!((store.in_scratch(1), store.in_scratch(2)), (None, Some(0)));
    // What is no record, whole or in part, is not stored.
    let bytes = store.layout().block_bytes() as usize;
    assert!(store.write_block(BlockId(0), &vec![0; bytes]).is_err());
    assert!(store.check_records(&vec![0; bytes / 2]).is_err());
    // A batch without raw rows.
    let mut batch = DeviceBatch::default();
    let lens = BatchTables { q_indptr: &[0, 1], kv_lens: &[1] };
    let tables = GroupTables { indptr: &[0, 1], indices: &[0], slots: &[0] };
    batch.upload(&backend, Stream::DEFAULT, &lens, [tables].into_iter()).unwrap();
    let row = [0f32; 64];
    let refused = store.append(0, &batch, 0, Rows::F32(&row), Rows::F32(&row), None);
    assert!(matches!(refused, Err(Error::InvalidState { .. })));
    assert!(store.read_refused(&batch, 0, &mut []).is_err());
}
