BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'of-version-0-1');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MINIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,250,2.9,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,1,500,2.7,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,1,750,2.6,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,1,1000,2.65,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(5,2,250,3.0,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(6,2,500,2.9,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(7,3,250,2.8,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(8,3,500,2.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(9,3,750,2.72,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(10,3,1000,2.7,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(11,4,250,2.5,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(12,4,500,NULL,'NAN');
INSERT INTO "trial_intermediate_values" VALUES(13,5,250,2.4,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(14,6,250,2.95,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'train.learning_rate',0.00021,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(2,1,'train.packing',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(3,1,'lora.r',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(4,1,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
INSERT INTO "trial_params" VALUES(5,2,'train.learning_rate',1.3e-05,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(6,2,'train.packing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(7,2,'lora.r',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(8,2,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
INSERT INTO "trial_params" VALUES(9,3,'train.learning_rate',0.0011,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(10,3,'train.packing',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(11,3,'lora.r',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(12,3,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
INSERT INTO "trial_params" VALUES(13,4,'train.learning_rate',0.0028,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(14,4,'train.packing',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(15,4,'lora.r',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(16,4,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
INSERT INTO "trial_params" VALUES(17,5,'train.learning_rate',0.0002,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(18,5,'train.packing',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(19,5,'lora.r',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(20,5,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
INSERT INTO "trial_params" VALUES(21,6,'train.learning_rate',5.0e-05,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 1e-05, "high": 0.003, "log": true}}');
INSERT INTO "trial_params" VALUES(22,6,'train.packing',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "bfd"]}}');
INSERT INTO "trial_params" VALUES(23,6,'lora.r',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [8, 16, 32]}}');
INSERT INTO "trial_params" VALUES(24,6,'lora.alpha_ratio',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1, 2]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'fixed_params','{"train.learning_rate": 0.00021, "train.packing": "bfd", "lora.r": 16, "lora.alpha_ratio": 2}');
INSERT INTO "trial_system_attributes" VALUES(2,2,'fixed_params','{"train.learning_rate": 1.3e-05, "train.packing": "none", "lora.r": 8, "lora.alpha_ratio": 2}');
INSERT INTO "trial_system_attributes" VALUES(3,3,'fixed_params','{"train.learning_rate": 0.0011, "train.packing": "bfd", "lora.r": 32, "lora.alpha_ratio": 2}');
INSERT INTO "trial_system_attributes" VALUES(4,4,'fixed_params','{"train.learning_rate": 0.0028, "train.packing": "bfd", "lora.r": 32, "lora.alpha_ratio": 2}');
INSERT INTO "trial_system_attributes" VALUES(5,5,'fixed_params','{"train.learning_rate": 0.0002, "train.packing": "bfd", "lora.r": 8, "lora.alpha_ratio": 2}');
INSERT INTO "trial_system_attributes" VALUES(6,6,'fixed_params','{"train.learning_rate": 5e-05, "train.packing": "none", "lora.r": 16, "lora.alpha_ratio": 2}');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'config','{"number": 0, "point": {"train.learning_rate": 0.00021, "train.packing": "bfd", "lora.r": 16, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 0.00021, "packing": "bfd"}, "lora": {"r": 16, "lora_alpha": 32}}');
INSERT INTO "trial_user_attributes" VALUES(2,1,'started','"2026-12-01T03:07:14.170503+00:00"');
INSERT INTO "trial_user_attributes" VALUES(3,1,'outcome','"COMPLETED"');
INSERT INTO "trial_user_attributes" VALUES(4,1,'finished','"2026-12-01T03:07:14.187674+00:00"');
INSERT INTO "trial_user_attributes" VALUES(5,2,'config','{"number": 1, "point": {"train.learning_rate": 1.3e-05, "train.packing": "none", "lora.r": 8, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 1.3e-05, "packing": "none"}, "lora": {"r": 8, "lora_alpha": 16}}');
INSERT INTO "trial_user_attributes" VALUES(6,2,'started','"2026-12-01T03:07:14.211925+00:00"');
INSERT INTO "trial_user_attributes" VALUES(7,2,'outcome','"STOPPED"');
INSERT INTO "trial_user_attributes" VALUES(8,2,'cause','"early stopping"');
INSERT INTO "trial_user_attributes" VALUES(9,2,'reason','"asha at 500 tokens"');
INSERT INTO "trial_user_attributes" VALUES(10,2,'finished','"2026-12-01T03:07:14.220835+00:00"');
INSERT INTO "trial_user_attributes" VALUES(11,3,'config','{"number": 2, "point": {"train.learning_rate": 0.0011, "train.packing": "bfd", "lora.r": 32, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 0.0011, "packing": "bfd"}, "lora": {"r": 32, "lora_alpha": 64}}');
INSERT INTO "trial_user_attributes" VALUES(12,3,'started','"2026-12-01T03:07:14.246745+00:00"');
INSERT INTO "trial_user_attributes" VALUES(13,3,'outcome','"COMPLETED"');
INSERT INTO "trial_user_attributes" VALUES(14,3,'finished','"2026-12-01T03:07:14.259932+00:00"');
INSERT INTO "trial_user_attributes" VALUES(15,4,'config','{"number": 3, "point": {"train.learning_rate": 0.0028, "train.packing": "bfd", "lora.r": 32, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 0.0028, "packing": "bfd"}, "lora": {"r": 32, "lora_alpha": 64}}');
INSERT INTO "trial_user_attributes" VALUES(16,4,'started','"2026-12-01T03:07:14.281695+00:00"');
INSERT INTO "trial_user_attributes" VALUES(17,4,'outcome','"INFEASIBLE"');
INSERT INTO "trial_user_attributes" VALUES(18,4,'cause','"diverged"');
INSERT INTO "trial_user_attributes" VALUES(19,4,'reason','"eval_loss is nan after 503 tokens"');
INSERT INTO "trial_user_attributes" VALUES(20,4,'finished','"2026-12-01T03:07:14.290247+00:00"');
INSERT INTO "trial_user_attributes" VALUES(21,5,'config','{"number": 4, "point": {"train.learning_rate": 0.0002, "train.packing": "bfd", "lora.r": 8, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 0.0002, "packing": "bfd"}, "lora": {"r": 8, "lora_alpha": 16}}');
INSERT INTO "trial_user_attributes" VALUES(22,5,'started','"2026-12-01T03:07:14.313958+00:00"');
INSERT INTO "trial_user_attributes" VALUES(23,5,'outcome','"FAILED"');
INSERT INTO "trial_user_attributes" VALUES(24,5,'cause','"worker-lost"');
INSERT INTO "trial_user_attributes" VALUES(25,5,'reason','"the worker died\nwith exit code 1"');
INSERT INTO "trial_user_attributes" VALUES(26,5,'log_tail','"Traceback: boom\nKilled"');
INSERT INTO "trial_user_attributes" VALUES(27,5,'finished','"2026-12-01T03:07:14.320468+00:00"');
INSERT INTO "trial_user_attributes" VALUES(28,6,'config','{"number": 5, "point": {"train.learning_rate": 5e-05, "train.packing": "none", "lora.r": 16, "lora.alpha_ratio": 2}, "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "train": {"max_length": 256, "seed": 0, "learning_rate": 5e-05, "packing": "none"}, "lora": {"r": 16, "lora_alpha": 32}}');
INSERT INTO "trial_user_attributes" VALUES(29,6,'started','"2026-12-01T03:07:14.343740+00:00"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,2.6,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,2.9,'FINITE');
INSERT INTO "trial_values" VALUES(3,3,0,2.7,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-12-01 03:07:14.157836','2026-12-01 03:07:14.195185');
INSERT INTO "trials" VALUES(2,1,1,'PRUNED','2026-12-01 03:07:14.206247','2026-12-01 03:07:14.229767');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-12-01 03:07:14.241293','2026-12-01 03:07:14.266644');
INSERT INTO "trials" VALUES(4,3,1,'PRUNED','2026-12-01 03:07:14.276496','2026-12-01 03:07:14.298232');
INSERT INTO "trials" VALUES(5,4,1,'FAIL','2026-12-01 03:07:14.308861','2026-12-01 03:07:14.329397');
INSERT INTO "trials" VALUES(6,5,1,'RUNNING','2026-12-01 03:07:14.338657',NULL);
CREATE TABLE tuner_reports (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	tokens BIGINT NOT NULL, 
	trained_tokens BIGINT, 
	step BIGINT, 
	epoch DOUBLE, 
	train_loss DOUBLE, 
	eval_loss DOUBLE, 
	mean_token_accuracy DOUBLE, 
	learning_rate DOUBLE, 
	grad_norm DOUBLE, 
	tokens_per_s DOUBLE, 
	peak_memory_bytes BIGINT, 
	duration_s DOUBLE, 
	adapter_path TEXT, 
	time DATETIME, 
	PRIMARY KEY (sweep, trial, tokens)
);
INSERT INTO "tuner_reports" VALUES('of-version-0-1',0,250,253,2,0.05,3.0,2.9,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.177637');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',0,500,503,5,0.1,2.80000000000000026645e+00,2.7,0.5,0.00021,1.25,310.0,734003200,5.0,'/runs/tokens-500','2026-12-01 03:07:14.181997');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',0,750,753,7,0.15,2.7,2.6,0.5,0.00021,1.25,310.0,734003200,7.5,'/runs/tokens-750','2026-12-01 03:07:14.184228');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',0,1000,1003,10,0.2,2.75,2.65,0.5,0.00021,1.25,310.0,734003200,10.0,'/runs/tokens-1000','2026-12-01 03:07:14.186072');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',1,250,253,2,0.05,3.1,3.0,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.216787');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',1,500,503,5,0.1,3.0,2.9,0.5,0.00021,1.25,310.0,734003200,5.0,'/runs/tokens-500','2026-12-01 03:07:14.219134');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',2,250,253,2,0.05,2.9,2.8,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.251466');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',2,500,503,5,0.1,2.85,2.75,0.5,0.00021,1.25,310.0,734003200,5.0,'/runs/tokens-500','2026-12-01 03:07:14.253929');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',2,750,753,7,0.15,2.82000000000000028421e+00,2.72,0.5,0.00021,1.25,310.0,734003200,7.5,'/runs/tokens-750','2026-12-01 03:07:14.256224');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',2,1000,1003,10,0.2,2.80000000000000026645e+00,2.7,0.5,0.00021,1.25,310.0,734003200,10.0,'/runs/tokens-1000','2026-12-01 03:07:14.258239');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',3,250,253,2,0.05,2.6,2.5,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.286247');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',3,500,503,5,0.1,NULL,NULL,0.5,0.00021,1.25,310.0,734003200,5.0,'/runs/tokens-500','2026-12-01 03:07:14.288580');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',4,250,253,2,0.05,2.5,2.4,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.318516');
INSERT INTO "tuner_reports" VALUES('of-version-0-1',5,250,253,2,0.05,3.05000000000000026645e+00,2.95,0.5,0.00021,1.25,310.0,734003200,2.5,'/runs/tokens-250','2026-12-01 03:07:14.348265');
CREATE TABLE tuner_requests (
	id INTEGER NOT NULL, 
	sweep VARCHAR(64) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	value JSON, 
	answer JSON, 
	refusal TEXT, 
	asked DATETIME, 
	taken DATETIME, 
	answered DATETIME, 
	PRIMARY KEY (id)
);
CREATE TABLE tuner_sweeps (
	name VARCHAR(64) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	message TEXT, 
	spec JSON NOT NULL, 
	tokens_per_trial BIGINT, 
	data JSON, 
	baseline JSON, 
	sharing JSON, 
	promoted JSON, 
	pid INTEGER, 
	host VARCHAR(255), 
	driven_s DOUBLE, 
	created DATETIME, 
	started DATETIME, 
	heartbeat DATETIME, 
	finished DATETIME, 
	PRIMARY KEY (name)
);
INSERT INTO "tuner_sweeps" VALUES('of-version-0-1','interrupted',NULL,'{"name": "of-version-0-1", "model": {"name": "some/base", "revision": "main", "gguf_file": null, "dtype": "bfloat16", "quantization": "none", "attn_implementation": null, "trust_remote_code": false}, "data": {"path": "/data/train.jsonl", "name": null, "split": "train", "revision": null, "format": "auto", "columns": {}, "template": null, "formatter": null, "eval_path": null, "eval_fraction": 0.05, "max_eval_examples": 500, "max_train_examples": null, "seed": 0}, "train": {"max_length": 256, "seed": 0}, "lora": {}, "space": {"train.learning_rate": {"when": null, "type": "log_uniform", "low": 1e-05, "high": 0.003, "step": null}, "train.packing": {"when": null, "type": "choice", "values": ["none", "bfd"]}, "lora.r": {"when": null, "type": "choice", "values": [8, 16, 32]}, "lora.alpha_ratio": {"when": null, "type": "choice", "values": [0.5, 1, 2]}}, "objective": {"metric": "eval_loss", "goal": "minimize"}, "budget": {"trials": 6, "tokens_per_trial": 1000, "steps_per_trial": null, "epochs_per_trial": null, "evals_per_trial": 4, "time_limit": null, "tokens": null, "gpu_hours": null, "disk": null}, "search": {"sampler": "tpe", "startup_trials": 8, "seed": 0, "enqueue": []}, "stopping": {"type": "asha", "grace_evals": 2, "reduction_factor": 3, "patience": null, "min_delta": 0.0}, "resources": {"strategy": "auto", "offload": false, "deepspeed": null, "fsdp": null, "share_base": "auto", "workers_per_trial": 1, "cpus_per_worker": 1, "gpus_per_worker": null, "memory_per_worker": null, "max_concurrent_trials": null, "stuck_after": 600.0}, "promotion": {"alias": "production", "max_regression": 0.01, "merge_into": "dequantized", "server": null}, "storage": {"root": "/srv/runs", "study": null, "keep_best": 3}}',1000,'{"format": "prompt_completion", "rows_read": 1363, "rows_train": 1300, "rows_eval": 60, "truncated": 12, "duplicates_removed": 1, "train_tokens": 110243, "dropped": {"empty": {"count": 2, "rows": [3, 9]}}, "eval_dropped": {}, "fingerprints": {"data": "d1", "eval": "e1"}, "base": {"config.json": "c1"}}','{"eval_loss": 3.0, "mean_token_accuracy": 0.41}','{"slots": 0, "engines": 0, "reason": "resources.share_base is off"}',NULL,4242,'head',2.48756623001099796965e-01,'2026-12-01 03:07:14.089749','2026-12-01 03:07:14.104667','2026-12-01 03:07:14.104667','2026-12-01 03:07:14.351065');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
CREATE INDEX ix_tuner_requests_sweep ON tuner_requests (sweep);
COMMIT;
