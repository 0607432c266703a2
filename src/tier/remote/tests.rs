//! Servers that answer what they should not, late, or never: every call ends in time, with the
//! outcome that it has to have.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use super::{RemoteOptions, open};
use crate::tier::{Get, ObjectKey, Outcome, Put, Store};

const BYTES: usize = 8192;

/// A server that reads once from each connection, and does what it is made for with it.
fn server(scheme: &str, act: impl Fn(TcpStream) + Send + 'static) -> Arc<dyn Store> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let _ = connection.read(&mut [0; 4096]);
            act(connection);
        }
    });
    let timeout = Duration::from_millis(300);
    let options = RemoteOptions { timeout, ..RemoteOptions::default() };
    open(
        &alloc::format!("{scheme}://127.0.0.1:{port}/1").replace("redis://", "redis://:pw@"),
        &options,
    )
    .unwrap()
}

fn answers(answer: &[u8]) -> Box<dyn Fn(TcpStream) + Send> {
    let answer = answer.to_vec();
    Box::new(move |mut connection| {
        let _ = connection.write_all(&answer);
        // Until the other side is done.
        let _ = connection.read_to_end(&mut Vec::new());
    })
}

/// The outcomes of getting two objects, and that it did not take long.
fn get_two(store: &dyn Store) -> Vec<Outcome> {
    let begin = Instant::now();
    let mut buffers = [vec![0; BYTES], vec![0; BYTES]];
    let mut gets: Vec<Get> = buffers
        .iter_mut()
        .enumerate()
        .map(|(n, object)| Get { key: ObjectKey([n as u8; 32]), object })
        .collect();
    let mut outcomes = vec![Outcome::None; 2];
    store.get(&mut gets, &mut outcomes);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    outcomes
}

/// What is said to a client that gives a password and asks for a database.
const HELLO: &str = "+OK\r\n+OK\r\n";

#[test]
fn answers_of_redis_that_cannot_be_are_failures_or_bad_objects() {
    use Outcome::{Absent, Bad, Done, Failed};
    let whole = "x".repeat(BYTES);
    let cases: Vec<(alloc::string::String, [Outcome; 2])> = vec![
        (alloc::format!("{HELLO}${BYTES}\r\n{whole}\r\n$-1\r\n"), [Done, Absent]),
        (alloc::format!("{HELLO}$5\r\nhello\r\n${BYTES}\r\n{whole}\r\n"), [Bad, Done]),
        (alloc::format!("{HELLO}$20000\r\n{}\r\n$0\r\n\r\n", "y".repeat(20_000)), [Bad, Bad]),
        // Says much and sends little: time is all that it takes.
        (alloc::format!("{HELLO}$9000000000000000000\r\nhello"), [Bad, Failed]),
        (alloc::format!("{HELLO}${BYTES}\r\n{whole}__$-1\r\n"), [Failed, Failed]),
        (alloc::format!("{HELLO}-WRONGTYPE no\r\n-LOADING wait\r\n"), [Bad, Failed]),
        (alloc::format!("{HELLO}$-2\r\n"), [Failed, Failed]),
        (alloc::format!("{HELLO}*2\r\n$1\r\na\r\n"), [Failed, Failed]),
        (alloc::format!("{HELLO}{}", "z".repeat(100_000)), [Failed, Failed]),
        (alloc::format!("{HELLO}\r\n"), [Failed, Failed]),
        (alloc::format!("{HELLO}:99999999999999999999\r\n"), [Failed, Failed]),
        ("-WRONGPASS no\r\n+OK\r\n".into(), [Failed, Failed]),
        ("HTTP/1.1 400 Bad Request\r\n\r\n".into(), [Failed, Failed]),
    ];
    for (answer, expected) in cases {
        let store = server("redis", answers(answer.as_bytes()));
        let shown = answer.chars().take(60).collect::<alloc::string::String>();
        assert_eq!(get_two(&*store), expected, "{shown:?}");
    }
}

#[test]
fn what_a_server_refuses_is_said_until_it_does_not() {
    let redis = |answer: &str| server("redis", answers(answer.as_bytes()));
    let s3 = |status: &str| {
        let close = "Connection: close\r\nContent-Length: 0\r\n\r\n";
        server("s3+http", answers(alloc::format!("HTTP/1.1 {status}\r\n{close}").as_bytes()))
    };
    let mut wrong = alloc::string::String::from(HELLO);
    wrong.push_str("-NOPERM this user has no permissions\r\n-ERR other\r\n");
    for (store, words) in [
        (redis("-WRONGPASS invalid pw\r\n+OK\r\n"), Some("refuses the user or the password")),
        (redis("-ERR invalid password\r\n+OK\r\n"), Some("refuses the user or the password")),
        (redis("+OK\r\n-NOAUTH pw\r\n"), Some("wants a password")),
        (redis(&wrong), Some("does not allow")),
        (redis(&alloc::format!("{HELLO}-LOADING wait\r\n-MISCONF no\r\n")), None),
        (redis(&alloc::format!("{HELLO}-NOPERM no\r\n$-1\r\n")), None),
        (s3("403 Forbidden"), Some("refuses the access key")),
        (s3("401 Unauthorized"), Some("refuses the access key")),
        (s3("404 Not Found"), None),
        (s3("500 Oops"), None),
    ] {
        assert_eq!(store.refusal(), None);
        get_two(&*store);
        let said = store.refusal();
        assert_eq!(said.is_some(), words.is_some(), "{said:?}");
        if let (Some(said), Some(words)) = (said, words) {
            assert!(said.contains(words) && !said.contains("pw"), "{said}");
        }
    }
    let no_bucket = s3("404 Not Found");
    let put = Put { key: ObjectKey::default(), object: &[0; 10], label: None };
    no_bucket.put(&[put], &mut [Outcome::None]);
    assert!(no_bucket.refusal().is_some_and(|said| said.contains("no such bucket")));
}

#[test]
fn puts_say_when_there_is_no_room() {
    let answer = alloc::format!("{HELLO}+OK\r\n-OOM command not allowed\r\n-READONLY\r\n");
    let store = server("redis", answers(answer.as_bytes()));
    let object = vec![0; BYTES];
    let puts = [1, 2, 3].map(|n| Put { key: ObjectKey([n; 32]), object: &object, label: None });
    let mut outcomes = [Outcome::None; 3];
    store.put(&puts, &mut outcomes);
    assert_eq!(outcomes, [Outcome::Done, Outcome::Full, Outcome::Failed]);
}

#[test]
fn answers_of_s3_that_cannot_be_are_failures_or_bad_objects() {
    use Outcome::{Absent, Bad, Done, Failed};
    let whole = "x".repeat(BYTES);
    let close = "Connection: close\r\n";
    let cases = [
        (alloc::format!("200 OK\r\n{close}Content-Length: {BYTES}\r\n\r\n{whole}"), Done),
        (alloc::format!("200 OK\r\n{close}Content-Length: 5\r\n\r\nhello"), Bad),
        (
            alloc::format!(
                "200 OK\r\n{close}Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
            ),
            Bad,
        ),
        (
            alloc::format!(
                "200 OK\r\n{close}Transfer-Encoding: chunked\r\n\r\n2001\r\n{whole}y\r\n0\r\n\r\n"
            ),
            Bad,
        ),
        (alloc::format!("200 OK\r\n{close}Content-Length: {BYTES}\r\n\r\nhello"), Failed),
        (alloc::format!("404 Not Found\r\n{close}Content-Length: 0\r\n\r\n"), Absent),
        (alloc::format!("403 Forbidden\r\n{close}Content-Length: 0\r\n\r\n"), Failed),
        (
            alloc::format!("302 Found\r\n{close}Location: /elsewhere\r\nContent-Length: 0\r\n\r\n"),
            Failed,
        ),
        (alloc::format!("503 Slow Down\r\n{close}Content-Length: 0\r\n\r\n"), Failed),
        ("garbage".into(), Failed),
    ];
    for (answer, expected) in cases {
        let store = server("s3+http", answers(alloc::format!("HTTP/1.1 {answer}").as_bytes()));
        let shown = answer.chars().take(60).collect::<alloc::string::String>();
        assert_eq!(get_two(&*store)[0], expected, "{shown:?}");
    }
}

#[test]
fn servers_that_are_silent_slow_or_gone_are_not_waited_for() {
    for scheme in ["redis", "s3+http"] {
        let silent = server(scheme, |mut connection| {
            let _ = connection.read_to_end(&mut Vec::new());
        });
        assert_eq!(get_two(&*silent), [Outcome::Failed; 2], "{scheme}");
        assert!(!silent.exists(&[ObjectKey::default()], &mut [false]));
        let closing = server(scheme, drop);
        assert_eq!(get_two(&*closing), [Outcome::Failed; 2], "{scheme}");
        // A byte now and then, each of them in time.
        let dripping = server(scheme, |mut connection| {
            while connection.write_all(b"+").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        assert_eq!(get_two(&*dripping), [Outcome::Failed; 2], "{scheme}");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let gone =
            open(&alloc::format!("{scheme}://127.0.0.1:{port}/1"), &RemoteOptions::default());
        let gone = gone.unwrap();
        assert_eq!(get_two(&*gone), [Outcome::Failed; 2], "{scheme}");
        let mut outcomes = [Outcome::None];
        gone.put(
            &[Put { key: ObjectKey::default(), object: &[0; BYTES], label: None }],
            &mut outcomes,
        );
        assert_eq!(outcomes, [Outcome::Failed]);
        gone.remove(&[ObjectKey::default()]);
    }
}
