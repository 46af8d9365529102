use super::*;
use helios_wire::message::front;

/// What one record returned: values of sequences by name, with their increments.
type Values<'a> = &'a [(&'a str, i64, &'a [i64])];

fn drawn(values: Values<'_>) -> Vec<Drawn<String>> {
    let one = |(name, increment, values): &(&str, i64, &[i64])| Drawn {
        sequence: (*name).to_owned(),
        increment: *increment,
        values: values.to_vec(),
    };
    values.iter().map(one).collect()
}

/// Sequences by name, with the first and the last value of each.
type Spans = Vec<(String, i64, i64)>;

/// How records are cut into runs: how many records each has, and its spans. Records without values
/// between two runs are left out, as one that sets nothing back is no run.
fn cut(records: &[Values<'_>]) -> Vec<(usize, Spans)> {
    let mut out = Vec::new();
    let mut at = 0;
    while let Some(first) = records.get(at) {
        if first.is_empty() {
            at += 1;
            continue;
        }
        let mut run = Run::begin(&drawn(first), 0, 10);
        let behind = records.iter().skip(at + 1);
        let _ = behind.take_while(|r| run.take(&drawn(r), 0, 10)).count();
        at += run.records();
        let (count, spans) = (run.records(), run.into_spans());
        let spans = spans.into_iter().map(|s| (s.sequence, s.first, s.last));
        out.push((count, spans.collect()));
    }
    out
}

fn span(name: &str, first: i64, last: i64) -> (String, i64, i64) {
    (name.to_owned(), first, last)
}

#[test]
fn values_that_follow_each_other_are_one_run() {
    let s = |first, last| vec![span("s", first, last)];
    let table: &[(&str, &[Values<'_>], Vec<_>)] = &[
        ("one", &[&[("s", 1, &[5])]], vec![(1, s(5, 5))]),
        (
            "several rows",
            &[&[("s", 1, &[5, 6])], &[("s", 1, &[7])]],
            vec![(2, s(5, 7))],
        ),
        (
            "others in between, and behind",
            &[&[("s", 1, &[5])], &[], &[], &[("s", 1, &[6])], &[]],
            vec![(4, s(5, 6))],
        ),
        (
            "another drew in between",
            &[&[("s", 1, &[5])], &[("s", 1, &[7])], &[("s", 1, &[8])]],
            vec![(1, s(5, 5)), (2, s(7, 8))],
        ),
        (
            "in turns with another session",
            &[&[("s", 1, &[1])], &[("s", 1, &[3])], &[("s", 1, &[5])]],
            vec![(1, s(1, 1)), (1, s(3, 3)), (1, s(5, 5))],
        ),
        (
            "the same value again",
            &[&[("s", 1, &[5])], &[("s", 1, &[5])]],
            vec![(1, s(5, 5)), (1, s(5, 5))],
        ),
        (
            "backwards",
            &[&[("s", 1, &[5])], &[("s", 1, &[4])]],
            vec![(1, s(5, 5)), (1, s(4, 4))],
        ),
        (
            "downwards in steps",
            &[&[("s", -7, &[5, -2])], &[("s", -7, &[-9])]],
            vec![(2, s(5, -9))],
        ),
        (
            "in steps that are not its own",
            &[&[("s", 50, &[1])], &[("s", 50, &[51])], &[("s", 50, &[52])]],
            vec![(2, s(1, 51)), (1, s(52, 52))],
        ),
        (
            "at the end of the numbers",
            &[&[("s", 1, &[i64::MAX])], &[("s", 1, &[i64::MIN])]],
            vec![(1, s(i64::MAX, i64::MAX)), (1, s(i64::MIN, i64::MIN))],
        ),
    ];
    for (what, records, runs) in table {
        assert_eq!(cut(records), *runs, "{what}");
    }
}

#[test]
fn several_sequences_in_a_run() {
    let both = |a: (i64, i64), b: (i64, i64)| vec![span("a", a.0, a.1), span("b", b.0, b.1)];
    let table: &[(&str, &[Values<'_>], Vec<_>)] = &[
        (
            "side by side",
            &[
                &[("a", 1, &[1]), ("b", 2, &[10])],
                &[("a", 1, &[2]), ("b", 2, &[12])],
            ],
            vec![(2, both((1, 2), (10, 12)))],
        ),
        (
            "tables in turns",
            &[&[("a", 1, &[1])], &[("b", 1, &[7])], &[("a", 1, &[2])]],
            vec![(3, both((1, 2), (7, 7)))],
        ),
        (
            "one of them has a gap",
            &[
                &[("a", 1, &[1]), ("b", 1, &[7])],
                &[("a", 1, &[2]), ("b", 1, &[9])],
                &[("a", 1, &[3])],
            ],
            vec![
                (1, both((1, 1), (7, 7))),
                (2, vec![span("a", 2, 3), span("b", 9, 9)]),
            ],
        ),
        (
            "one whose own values do not follow each other goes by itself, and is not set back",
            &[
                &[("a", 1, &[1]), ("b", 1, &[7, 9])],
                &[("a", 1, &[2]), ("b", 1, &[10])],
            ],
            vec![(1, vec![span("a", 1, 1)]), (1, both((2, 2), (10, 10)))],
        ),
    ];
    for (what, records, runs) in table {
        assert_eq!(cut(records), *runs, "{what}");
    }
}

#[test]
fn runs_are_bounded() {
    let grow = |count: i64, micros: u64, bytes: usize, values: i64| {
        let of = |n: i64| (0..values).map(|v| n * values + v).collect::<Vec<_>>();
        let record = |n: i64| {
            let values = of(n);
            vec![Drawn {
                sequence: (),
                increment: 1,
                values,
            }]
        };
        let mut run = Run::begin(&record(0), 1_000, bytes);
        for n in 1..count {
            let at = 1_000 + micros * u64::try_from(n).unwrap_or_default();
            if !run.take(&record(n), at, bytes) {
                assert!(run.is_closed());
                break;
            }
        }
        run.records()
    };
    assert_eq!(grow(200, 0, 10, 1), 200);
    assert_eq!(grow(1_000, 0, 10, 1), RECORDS);
    assert_eq!(grow(100, 100_000, 10, 1), 11);
    assert_eq!(grow(100, 0, BYTES / 4, 1), 4);
    assert_eq!(grow(100, 0, BYTES * 4, 1), 1);
    assert_eq!(grow(100, 0, 10, 1_000), 16);
    assert_eq!(grow(100, 0, 10, 100_000), 1);
    // What is looked at and not taken counts, too.
    let mut run = Run::begin(&drawn(&[("s", 1, &[1])]), 0, 0);
    while run.take(&[], 0, 0) {}
    assert_eq!(run.records(), 1);
}

fn framed(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    out.extend_from_slice(body);
    out
}

fn answered(tags: &[&str]) -> Reply {
    let mut reply = Reply::default();
    for tag in tags {
        let frame = match *tag {
            "" => framed(b'I', b""),
            "error" => framed(b'E', b"SERROR\0C23505\0Mm\0\0"),
            "suspended" => framed(b's', b""),
            tag => framed(b'C', &[tag.as_bytes(), b"\0"].concat()),
        };
        reply.add(frame[0], &frame);
    }
    reply
}

#[test]
fn what_stands_in_a_run() {
    for tags in [
        &["INSERT 0 1"][..],
        &["SELECT 5"],
        &["UPDATE 0", "DELETE 12"],
        &["COPY 7", "MERGE 1"],
        &["DECLARE CURSOR", "FETCH 3", "MOVE 1", "CLOSE CURSOR"],
        &["SAVEPOINT", "error"],
        &["ROLLBACK", "RELEASE"],
        &["", "suspended"],
        &[],
    ] {
        assert!(is_plain(&answered(tags)), "{tags:?}");
    }
    for tag in [
        "TRUNCATE TABLE",
        "ALTER SEQUENCE",
        "ALTER TABLE",
        "CREATE TABLE",
        "CREATE SEQUENCE",
        "DROP TABLE",
        "SELECTED 1",
        "DISCARD SEQUENCES",
        "SET",
        "RESET",
        "DO",
        "CALL",
        "PREPARE",
        "DEALLOCATE",
        "BEGIN",
        "LOCK TABLE",
        "NEW ONE 5",
    ] {
        assert!(!is_plain(&answered(&["INSERT 0 1", tag])), "{tag}");
    }
}

fn described(table: u8) -> Vec<u8> {
    let mut body = vec![0, 1, b'a', 0, 0, 0, 0, table, 0, 1, 0, 0, 0, 23];
    body.extend_from_slice(&[0; 8]);
    framed(b'T', &body)
}

fn returned(columns: Option<&[u8]>, value: u8) -> Reply {
    let mut reply = Reply::default();
    let row = framed(b'D', &[0, 1, 0, 0, 0, 1, value]);
    let end = framed(b'C', b"INSERT 0 1\0");
    let columns = columns.map(<[u8]>::to_vec);
    for frame in columns.into_iter().chain([row, end]) {
        reply.keep(frame[0], &frame);
        reply.add(frame[0], &frame);
    }
    reply
}

fn sent(fill: impl Fn(&mut bytes::BytesMut)) -> Vec<u8> {
    let mut out = bytes::BytesMut::new();
    fill(&mut out);
    out.to_vec()
}

fn parse(name: &[u8], text: &[u8]) -> Vec<u8> {
    sent(|out| front::parse(out, name, text, &[]).unwrap())
}

fn run_it(name: &[u8]) -> Vec<u8> {
    sent(|out| {
        front::bind(out, b"", name, &[], &[], &[]).unwrap();
        front::execute(out, b"", 0).unwrap();
    })
}

/// Drivers prepare each query under a name of its own, ask once for its columns, and close it.
#[test]
fn statements_that_are_prepared_on_the_way() {
    let (now, text) = (PreparedStatements::default(), b"insert into t returning a");
    let mut ahead = Ahead::of(&now);
    let tables = |seen: Option<Vec<Seen>>| seen.map(|s| s[0].columns[0].table);
    // Nobody knows it: what it returned is not known either.
    assert_eq!(ahead.seen(&run_it(b"s0"), &returned(None, b'1')), None);
    ahead.pass(&parse(b"s1", text));
    assert_eq!(ahead.seen(&run_it(b"s1"), &returned(None, b'1')), None);
    // One of the same text tells its columns.
    let first = [parse(b"s2", text), run_it(b"s2")].concat();
    let columns = described(9);
    let seen = ahead.seen(&first, &returned(Some(&columns), b'1'));
    assert_eq!(tables(seen), Some(9));
    ahead.pass(&first);
    for name in [b"s1", b"s2"] {
        let seen = ahead.seen(&run_it(name), &returned(None, b'2'));
        assert_eq!(tables(seen), Some(9));
    }
    // Another text does not have them.
    ahead.pass(&parse(b"s2", b"insert into u returning a"));
    assert_eq!(ahead.seen(&run_it(b"s2"), &returned(None, b'3')), None);
    ahead.pass(&sent(|out| {
        front::close(out, front::Target::Statement, b"s1").unwrap();
    }));
    assert_eq!(ahead.seen(&run_it(b"s1"), &returned(None, b'3')), None);
    // A simple query ends the statement without a name.
    ahead.pass(&parse(b"", text));
    let seen = ahead.seen(&run_it(b""), &returned(None, b'3'));
    assert_eq!(tables(seen), Some(9));
    ahead.pass(&sent(|out| front::query(out, b"select 1").unwrap()));
    assert_eq!(ahead.seen(&run_it(b""), &returned(None, b'4')), None);
}
