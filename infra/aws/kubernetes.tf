# EKS with a node group for each kind of pod. Groups are empty until a pod asks for them; Ray asks for pods, the cluster
# autoscaler for machines.

resource "aws_cloudwatch_log_group" "control_plane" {
  name              = "/aws/eks/${var.name}/cluster"
  retention_in_days = 365
  #checkov:skip=CKV_AWS_158:the control plane's log holds no photo and no key; CloudWatch encrypts it with a key of its own
}

resource "aws_eks_cluster" "this" {
  #checkov:skip=CKV_AWS_39:the public endpoint exists only for the networks in api_access_cidrs, and not at all where there are none
  name                      = var.name
  role_arn                  = aws_iam_role.cluster.arn
  version                   = var.kubernetes_version
  enabled_cluster_log_types = ["api", "audit", "authenticator", "controllerManager", "scheduler"]

  vpc_config {
    subnet_ids              = var.subnet_ids
    endpoint_private_access = true
    endpoint_public_access  = length(var.api_access_cidrs) > 0
    public_access_cidrs     = length(var.api_access_cidrs) > 0 ? var.api_access_cidrs : null
  }

  encryption_config {
    resources = ["secrets"] # Ray's tokens among them
    provider { key_arn = aws_kms_key.this.arn }
  }

  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }

  depends_on = [aws_cloudwatch_log_group.control_plane, aws_iam_role_policy_attachment.cluster]
}

resource "aws_eks_addon" "this" {
  for_each     = toset(["vpc-cni", "kube-proxy"]) # before the first machine
  cluster_name = aws_eks_cluster.this.name
  addon_name   = each.key
  # Without it network policies are accepted and do nothing.
  configuration_values = each.key == "vpc-cni" ? jsonencode({ enableNetworkPolicy = "true" }) : null
}

resource "aws_eks_addon" "dns" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "coredns"
  depends_on   = [aws_eks_node_group.this] # it runs on one
}

resource "aws_launch_template" "this" {
  for_each = var.pools
  name     = "${var.name}-${each.key}"

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1 # pods do not reach the machine's role
  }

  dynamic "block_device_mappings" {
    for_each = { "/dev/xvda" = 20, "/dev/xvdb" = each.value.disk_gb } # Bottlerocket: system, data
    content {
      device_name = block_device_mappings.key
      ebs {
        volume_size = block_device_mappings.value
        volume_type = "gp3"
        encrypted   = true
        kms_key_id  = aws_kms_key.this.arn
      }
    }
  }
}

resource "aws_eks_node_group" "this" {
  for_each        = var.pools
  cluster_name    = aws_eks_cluster.this.name
  node_group_name = each.key
  node_role_arn   = aws_iam_role.node.arn
  subnet_ids      = var.subnet_ids
  instance_types  = each.value.instance_types
  capacity_type   = each.value.spot ? "SPOT" : "ON_DEMAND"
  # Bottlerocket: a read-only system; the NVIDIA variant brings driver and device plugin.
  ami_type = each.value.gpu ? "BOTTLEROCKET_x86_64_NVIDIA" : "BOTTLEROCKET_x86_64"
  labels   = { "iir-dist/pool" = each.key }

  launch_template {
    id      = aws_launch_template.this[each.key].id
    version = aws_launch_template.this[each.key].latest_version
  }

  scaling_config {
    min_size     = each.key == "head" ? 1 : 0
    desired_size = each.key == "head" ? 1 : 0
    max_size     = each.value.max
  }

  dynamic "taint" {
    for_each = toset(concat(each.value.spot ? ["iir-dist/spot"] : [], each.value.gpu ? ["nvidia.com/gpu"] : []))
    content {
      key    = taint.value
      value  = "true"
      effect = "NO_SCHEDULE"
    }
  }

  lifecycle { ignore_changes = [scaling_config[0].desired_size] } # the autoscaler's business
  depends_on = [aws_iam_role_policy_attachment.node, aws_eks_addon.this]
}

# What the autoscaler has to know of a group that has no machine yet.
resource "aws_autoscaling_group_tag" "this" {
  for_each = merge([
    for pool, group in aws_eks_node_group.this : {
      "${pool} owned" = [pool, "k8s.io/cluster-autoscaler/${var.name}", "owned"]
      "${pool} label" = [pool, "k8s.io/cluster-autoscaler/node-template/label/iir-dist/pool", pool]
      # Pods ask for disk, and of a group's disk it knows nothing else.
      "${pool} disk" = [pool, "k8s.io/cluster-autoscaler/node-template/resources/ephemeral-storage", "${floor(var.pools[pool].disk_gb * 0.9)}Gi"]
    }
  ]...)
  autoscaling_group_name = aws_eks_node_group.this[each.value[0]].resources[0].autoscaling_groups[0].name
  tag {
    key                 = each.value[1]
    value               = each.value[2]
    propagate_at_launch = false
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
  depends_on = [aws_eks_node_group.this]
}

resource "helm_release" "autoscaler" {
  name       = "cluster-autoscaler"
  repository = "https://kubernetes.github.io/autoscaler"
  chart      = "cluster-autoscaler"
  version    = var.cluster_autoscaler_chart_version
  namespace  = "kube-system"
  values = [yamlencode({
    autoDiscovery = { clusterName = var.name, tags = ["k8s.io/cluster-autoscaler/${var.name}"] }
    awsRegion     = var.region
    nodeSelector  = { "iir-dist/pool" = "head" }
    rbac = { serviceAccount = {
      name        = "cluster-autoscaler"
      annotations = { "eks.amazonaws.com/role-arn" = aws_iam_role.autoscaler.arn }
    } }
  })]
  depends_on = [aws_eks_node_group.this]
}
