# The same on Google Cloud, smaller: a bucket, a private GKE cluster with KubeRay, an account that may use the bucket.
# Formatted and read by Terraform 1.11, scanned by checkov; never planned or applied against Google Cloud (no providers, no
# account here).
terraform {
  required_version = ">= 1.9"
  required_providers {
    google = { source = "hashicorp/google", version = "~> 7.0" }
    helm   = { source = "hashicorp/helm", version = "~> 3.0" }
  }
  backend "gcs" {} # terraform init -backend-config=bucket=...
}

provider "google" {
  project = var.project
  region  = var.region
}

provider "helm" {
  kubernetes = {
    host                   = "https://${google_container_cluster.this.endpoint}"
    cluster_ca_certificate = base64decode(google_container_cluster.this.master_auth[0].cluster_ca_certificate)
    exec = {
      api_version = "client.authentication.k8s.io/v1"
      command     = "gke-gcloud-auth-plugin"
    }
  }
}

# ---------------------------------------------------------------------------------------------------------- storage

resource "google_storage_bucket" "this" {
  #checkov:skip=CKV_GCP_62:who read which object is in Cloud Audit Logs where you want it; a second bucket of logs is not ours to keep
  name                        = var.bucket
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  versioning { enabled = true }

  lifecycle_rule { # what --force, a compaction or a finished stage's unfinished work has left as an old version
    condition { days_since_noncurrent_time = 14 }
    action { type = "Delete" }
  }
  lifecycle_rule {
    condition {
      age            = 7
      matches_prefix = ["tmp/"]
    }
    action { type = "Delete" }
  }
  lifecycle_rule {
    condition { age = 3 }
    action { type = "AbortIncompleteMultipartUpload" }
  }
}

# iir_dist reaches the bucket through its S3 interface, whose requests are signed with an HMAC key of this account. README.md
# says how to make the key, which must not get into Terraform's state.
resource "google_service_account" "storage" {
  account_id   = "${var.name}-storage"
  display_name = "iir_dist: reads and writes the bucket"
}

resource "google_storage_bucket_iam_member" "storage" {
  bucket = google_storage_bucket.this.name
  role   = "roles/storage.objectUser"
  member = google_service_account.storage.member
}

# ------------------------------------------------------------------------------------------------------- kubernetes

resource "google_service_account" "node" {
  account_id   = "${var.name}-node"
  display_name = "iir_dist: machines of the cluster"
}

resource "google_project_iam_member" "node" {
  for_each = toset(["roles/container.defaultNodeServiceAccount", "roles/artifactregistry.reader"])
  project  = var.project
  role     = each.key
  member   = google_service_account.node.member
}

resource "google_container_cluster" "this" {
  #checkov:skip=CKV_GCP_65:which group of people administers is for those who have such groups
  #checkov:skip=CKV_GCP_24:pod security policies are gone from Kubernetes; the namespace enforces the restricted standard
  #checkov:skip=CKV_GCP_66:images are yours; binary authorization needs an attestor of yours
  #checkov:skip=CKV_GCP_61:flow logs belong to the network, which is yours
  #checkov:skip=CKV_GCP_12:its Dataplane V2 always enforces network policies; the setting is that of its predecessor
  #checkov:skip=CKV_GCP_69:the default pool is removed; the pools below have GKE_METADATA
  name                        = var.name
  location                    = var.zone # one zone: Ray's nodes talk much, and traffic between zones is paid for
  network                     = var.network
  subnetwork                  = var.subnetwork
  remove_default_node_pool    = true
  initial_node_count          = 1
  enable_shielded_nodes       = true
  enable_intranode_visibility = true
  datapath_provider           = "ADVANCED_DATAPATH" # without it network policies are accepted and do nothing
  resource_labels             = { project = var.name }

  release_channel { channel = "REGULAR" }
  workload_identity_config { workload_pool = "${var.project}.svc.id.goog" }
  ip_allocation_policy {}
  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = length(var.api_access_cidrs) == 0
    master_ipv4_cidr_block  = var.control_plane_cidr
  }
  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = toset(var.api_access_cidrs)
      content { cidr_block = cidr_blocks.value }
    }
  }
  master_auth {
    client_certificate_config { issue_client_certificate = false }
  }
}

resource "google_container_node_pool" "this" {
  for_each = var.pools
  name     = each.key
  cluster  = google_container_cluster.this.id
  autoscaling {
    min_node_count = each.key == "head" ? 1 : 0
    max_node_count = each.value.max
  }
  management {
    auto_repair  = true
    auto_upgrade = true
  }
  node_config {
    machine_type    = each.value.machine_type
    spot            = each.value.spot
    image_type      = "COS_CONTAINERD"
    disk_size_gb    = each.value.disk_gb
    service_account = google_service_account.node.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    labels          = { "iir-dist/pool" = each.key }
    workload_metadata_config { mode = "GKE_METADATA" }
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    dynamic "guest_accelerator" {
      for_each = each.value.gpu == null ? [] : [each.value.gpu]
      content {
        type  = guest_accelerator.value
        count = 1
        gpu_driver_installation_config { gpu_driver_version = "LATEST" }
      }
    }
    dynamic "taint" { # GKE taints GPU machines itself
      for_each = each.value.spot ? ["iir-dist/spot"] : []
      content {
        key    = taint.value
        value  = "true"
        effect = "NO_SCHEDULE"
      }
    }
  }
}

resource "helm_release" "kuberay" {
  name             = "kuberay-operator"
  repository       = "https://ray-project.github.io/kuberay-helm/"
  chart            = "kuberay-operator"
  version          = var.kuberay_version
  namespace        = "kuberay-system"
  create_namespace = true
  values = [yamlencode({
    nodeSelector = { "iir-dist/pool" = "head" }
    featureGates = [{ name = "RayClusterStatusConditions", enabled = true }, { name = "RayJobDeletionPolicy", enabled = true }]
    resources    = { requests = { cpu = "100m", memory = "512Mi" }, limits = { cpu = "500m", memory = "512Mi" } }
  })]
  depends_on = [google_container_node_pool.this]
}

output "bucket" {
  value = "s3://${google_storage_bucket.this.name}"
}

output "kubeconfig" {
  value = "gcloud container clusters get-credentials ${google_container_cluster.this.name} --zone ${var.zone} --project ${var.project}"
}
