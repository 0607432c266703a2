//! What NIXL's stores do without NIXL: files, addresses, a library that is none.

use super::*;

fn address(text: &str) -> Result<PathBuf> {
    files::directory(&Url::parse(text).unwrap(), "kvcache/")
}

#[test]
fn addresses_name_directories_from_the_root_on() {
    for (text, path) in [
        ("nixl+posix:/srv/kv", "/srv/kv"),
        ("nixl+posix:///srv/kv", "/srv/kv"),
        ("nixl+posix:/srv/a%20b/", "/srv/a b/"),
        ("nixl+posix:/srv/../kv", "/kv"),
    ] {
        assert_eq!(address(text).unwrap(), PathBuf::from(path), "{text}");
    }
    for text in ["nixl+posix:", "nixl+posix:/", "nixl+posix:kv", "nixl+posix://host/kv"] {
        assert!(matches!(address(text), Err(Error::InvalidArgument { .. })), "{text}");
    }
}

#[test]
fn names_of_objects_stay_below_the_directory() {
    let url = Url::parse("nixl+posix:/srv/kv").unwrap();
    for prefix in ["", "a", "a/", "a/b/c-"] {
        assert!(files::directory(&url, prefix).is_ok(), "{prefix}");
    }
    for prefix in ["/", "/etc/", "..", "a/../../b", "./a", ".writing/"] {
        assert!(files::directory(&url, prefix).is_err(), "{prefix}");
    }
    let key = "ab".repeat(32);
    let path = files::path(&PathBuf::from("/srv/kv"), &alloc::format!("a/b-{key}"));
    assert_eq!(path, alloc::format!("/srv/kv/a/b-ab/{key}"));
}
