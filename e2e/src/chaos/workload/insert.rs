//! Unique rows by requests that commit by themselves: every form of an implicit transaction.

use rand::RngExt;

use super::{Gone, Worker};
use crate::chaos::checker::effects::Effect;
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;
use crate::chaos::wire::{Answer, Statement, Trouble};

/// The forms.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// One statement in the client's style.
    One,
    /// One statement that returns what it wrote.
    Returning,
    /// Several statements in one simple query.
    Several,
    /// The same with BEGIN and COMMIT in it.
    Block,
    /// Several statements up to one Sync.
    Pipeline,
    /// A DO block.
    Do,
    /// A procedure that commits in its middle: two transactions in one statement.
    Procedure,
}

const FORMS: [Form; 7] = [
    Form::One,
    Form::Returning,
    Form::Several,
    Form::Block,
    Form::Pipeline,
    Form::Do,
    Form::Procedure,
];

pub(super) fn tables(schema: &str) -> String {
    format!(
        "CREATE TABLE {schema}.rows (request bigint NOT NULL, item text NOT NULL);
         CREATE PROCEDURE {schema}.twice(a bigint, b bigint) LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO {schema}.rows VALUES (a, 'first'); COMMIT;
             INSERT INTO {schema}.rows VALUES (b, 'second'); END $$"
    )
}

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    let id = worker.id();
    let form = FORMS[worker.rng.random_range(0..FORMS.len())];
    let rows = match form {
        Form::Procedure => return procedure(worker).await,
        Form::One | Form::Returning => 1,
        _ => worker.rng.random_range(2..=4),
    };
    let mut effect = Effect {
        id,
        client: worker.client,
        rows: (0..rows).map(|n| format!("{form:?} {n}")).collect(),
        outcome: Outcome::Failed,
        sent: format!("{form:?} of {rows} rows"),
        when: (worker.now(), 0),
    };
    let result = match send(worker, form, &effect).await {
        Ok(answer) => {
            effect.outcome = Outcome::Ok;
            if answer.status != b'I' {
                worker.violation(&format!("{form:?} left status {}", answer.status));
            }
            worker.notes.count(Outcome::Ok);
            Ok(())
        }
        Err(trouble) => {
            let what = effect.sent.clone();
            let (outcome, result) = worker.failed(&trouble, At::Autocommit, &what).await;
            effect.outcome = outcome;
            result
        }
    };
    effect.when.1 = worker.now();
    worker.notes.effects.push(effect);
    result
}

/// Each half is a request of its own; where there is an error, nobody says how far it came.
async fn procedure(worker: &mut Worker) -> Result<(), Gone> {
    let (first, second) = (worker.id(), worker.id());
    let began = worker.now();
    let sql = format!("CALL {}.twice({first}, {second})", worker.schema());
    let answer = match worker.conn() {
        Ok(conn) => conn.simple(&sql, 1).await,
        Err(trouble) => Err(trouble),
    };
    let (outcome, result) = match answer {
        Ok(_) => {
            worker.notes.count(Outcome::Ok);
            (Outcome::Ok, Ok(()))
        }
        Err(trouble) => match worker.failed(&trouble, At::Autocommit, &sql).await {
            (Outcome::Ok, result) => (Outcome::Ok, result),
            (_, result) => (Outcome::Unknown, result),
        },
    };
    for (id, row) in [(first, "first"), (second, "second")] {
        worker.notes.effects.push(Effect {
            id,
            client: worker.client,
            rows: vec![row.to_owned()],
            outcome,
            sent: format!("{row} half of {sql}"),
            when: (began, worker.now()),
        });
    }
    result
}

async fn send(worker: &mut Worker, form: Form, effect: &Effect) -> Result<Answer, Trouble> {
    let schema = worker.schema();
    let id = effect.id;
    let insert = format!("INSERT INTO {schema}.rows VALUES ($1::bigint, $2)");
    let values = |item: &String| vec![id.to_string(), item.clone()];
    let texts: Vec<String> = effect
        .rows
        .iter()
        .map(|item| format!("INSERT INTO {schema}.rows VALUES ({id}, '{item}')"))
        .collect();
    match (form, effect.rows.as_slice()) {
        (Form::One, [item]) => worker.ask(&insert, &values(item)).await,
        (Form::Returning, [item]) => {
            let sql = format!("{insert} RETURNING item");
            let answer = worker.ask(&sql, &values(item)).await?;
            let returned: String = answer.one(0)?;
            if returned != *item {
                return Err(Trouble::Protocol(format!("RETURNING gave {returned}")));
            }
            Ok(answer)
        }
        (Form::Block, _) => {
            let sql = format!("BEGIN; {}; COMMIT", texts.join("; "));
            worker.conn()?.simple(&sql, texts.len() + 2).await
        }
        (Form::Pipeline, items) => {
            let statements: Vec<Statement> = items
                .iter()
                .map(|item| Statement {
                    sql: insert.clone(),
                    parameters: values(item),
                })
                .collect();
            worker.conn()?.pipeline(&statements).await
        }
        (Form::Do, _) => {
            let sql = format!("DO $do$ BEGIN {}; END $do$", texts.join("; "));
            worker.conn()?.simple(&sql, 1).await
        }
        _ => worker.conn()?.simple(&texts.join("; "), texts.len()).await,
    }
}
